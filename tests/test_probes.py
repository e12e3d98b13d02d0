"""probes.py: tables over runs against values by hand."""
import json
import math

import pytest

from model import BadInput
from probes import compare, plot_sweep, read_sweep, sweep


def write_run(folder, losses, seconds_per_step=2.0):
    folder.mkdir(parents=True)
    lines = [{"step": 10 * i, "flops": 1000 * i, "seconds": 10 * i * seconds_per_step, "val_loss": loss,
              "bits_per_byte": loss / 2} for i, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1}\n')
    return str(folder)


def test_compare_finds_where_a_run_reaches_the_reference(tmp_path):
    """By hand: the plain runs end at 3.0 and 4.0 after 30 steps. LET passes 3.0 half-way from step 10 (3.5) to 20 (2.5), so at
    step 15 of 30, 50 %; the other seed reaches 4.0 exactly at step 20, 66.7 %. Seconds run 1.5 times as fast there."""
    runs = [write_run(tmp_path / "plain-0", [8, 5, 4, 3.0]), write_run(tmp_path / "plain-1", [8, 6, 5, 4.0]),
            write_run(tmp_path / "let-0", [8, 3.5, 2.5, 2.0], 3.0), write_run(tmp_path / "let-1", [8, 5, 4.0, 3.5], 3.0),
            write_run(tmp_path / "worse-1", [8, 7, 6, 5.0])]
    header, rule, plain, let, worse = compare(runs).splitlines()
    cells = [cell.strip() for cell in let.strip("| ").split("|")]
    assert cells == ["let", "2", "2.7500 ± 1.0607", "-0.7500 ± 0.3536", "1.3750 ± 0.5303", "58.3 ± 11.8 %", "58.3 ± 11.8 %",
                     "87.5 ± 17.7 %"]
    assert plain.split("|")[6:9] == [" 100.0 ± 0.0 % "] * 3
    assert worse.count("never") == 3
    assert header.count("|") == rule.count("|") == let.count("|")


@pytest.mark.parametrize("broken,why", [("name", "has to end in -SEED"), ("empty", "no evaluation"), ("text", "not the metrics"),
                                        ("none", "not the metrics"), ("seed", "no run of this seed")])
def test_compare_refuses_what_is_no_run(tmp_path, broken, why):
    runs = [write_run(tmp_path / "plain-0", [8, 5])]
    if broken == "name":
        runs.append(write_run(tmp_path / "let", [8, 5]))
    elif broken == "seed":
        runs.append(write_run(tmp_path / "let-1", [8, 5]))
    else:
        runs.append(str(tmp_path / "let-0"))
        if broken != "none":
            (tmp_path / "let-0").mkdir()
            (tmp_path / "let-0" / "metrics.jsonl").write_text('{"step": 1}\n' if broken == "empty" else "{")
    with pytest.raises(BadInput, match=why):
        compare(runs)


def test_a_run_that_did_not_finish_is_not_taken_for_a_final_loss(tmp_path):
    runs = [write_run(tmp_path / "plain-0", [8, 5, 4]), write_run(tmp_path / "wild-0", [8, 5, 4])]
    for run, steps in zip(runs, (20, 30)):
        (tmp_path / run / "config.json").write_text(json.dumps({"steps": steps}))
    plain, wild = compare(runs).splitlines()[2:]
    assert "| 4.0000 |" in plain and "1 of 1 did not finish" in wild and "| 4.0000" not in wild


def test_a_run_that_begins_below_the_reference_reaches_it_at_once(tmp_path):
    runs = [write_run(tmp_path / "plain-0", [8, 5, 4]), write_run(tmp_path / "branch-0", [3, 3.5, 2])]
    assert compare(runs).splitlines()[3].count(" 0.0 % ") == 3


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    run = write_run(tmp_path / "plain-0", [8, 5])
    with open(tmp_path / "plain-0" / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "val_l')
    assert "5.0000" in compare([run])


def test_two_folders_of_one_name_are_refused(tmp_path):
    with pytest.raises(BadInput, match="two folders of one name"):
        compare([write_run(tmp_path / "x" / "a-0", [8, 5]), write_run(tmp_path / "y" / "a-0", [8, 5])])


def write_sweep(folder, name, scale=1.0):
    """Final losses 2 and 4 at X = 0.5, 3 and 3 at X = 8; RMS W 0.1 * scale and 0.4 * scale at the first seed and the other."""
    runs = []
    for x, losses in (("8", (3.0, 3.0)), ("0.5", (2.0, 4.0))):
        for seed, loss in enumerate(losses):
            run = folder / f"{name}@{x}-{seed}"
            write_run(run, [8, loss])
            weights = {"head": {"rms": 0.1 * 4**seed * scale, "rms_effective": 1.0}}
            line = {"step": 20, "val_loss": loss, "bits_per_byte": 1.0, "flops": 1, "seconds": 1, "weights": weights}
            with open(run / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            runs.append(str(run))
    return runs


def test_sweep_gives_mean_and_sd_by_x_in_order(tmp_path):
    runs = write_sweep(tmp_path, "with-dash") + write_sweep(tmp_path, "b", 10.0)[:2]
    assert list(read_sweep(runs)) == ["with-dash", "b"]
    text = sweep(runs, "head")
    assert "| run | 0.5 | 8 |" in text
    assert f"| with-dash | 3.000 ± {math.sqrt(2):.3f} | 3.000 ± 0.000 |" in text
    assert "| with-dash | 0.2 → 1 | 0.2 → 1 |" in text, "geometric mean of 0.1 and 0.4"
    assert "| b |  | 2 → 1 |" in text


def test_a_sweep_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    plot_sweep(write_sweep(tmp_path, "a"), "head", str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name, piece, why", [("a-0", "head", "NAME@X-SEED"), ("a@x-0", "head", "NAME@X-SEED"),
                                              ("a@-1-0", "head", "NAME@X-SEED"), ("a@2-0", "tail", "--piece=tail")])
def test_sweep_refuses_what_is_none(tmp_path, name, piece, why):
    run = write_run(tmp_path / name, [8, 5])
    with pytest.raises(BadInput, match=why):
        sweep([run], piece)
