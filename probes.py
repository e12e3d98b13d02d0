"""probes.py: what can be measured on trained models and read from their runs. So far: tables over runs.

    python probes.py compare runs/plain-0 runs/plain-1 runs/let-0 runs/let-1       # NAME-SEED; the first is the reference
    python probes.py sweep runs/fixed@*-? runs/scalar@*-? --piece=head --plot=sweep.png         # NAME@X-SEED

Names
    run         a folder that train.py wrote; its metrics.jsonl is what is read here
    seed        what follows the last dash of its name; runs that differ in it alone are one row of a table
    X           of a sweep: the number between @ and the seed, such as a factor on a learning rate
    piece       a kind of logical matrix: q, k, v, o, gate, up, down, embed, head
"""
import argparse
import json
import math
import statistics
from pathlib import Path

from model import BadInput, command


def read_evaluations(run) -> list[dict]:
    """The lines of a run's metrics.jsonl that hold an evaluation. A run that stopped before its last step, as a diverged
    one does, has an infinite loss in the last."""
    path, lines = Path(run) / "metrics.jsonl", []
    try:
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                if lines:  # a kill can leave half a line
                    continue
                raise
    except (OSError, ValueError) as e:
        raise BadInput(f"{path}: not the metrics of a run ({e})") from None
    lines = [line for line in lines if isinstance(line, dict) and "val_loss" in line]
    if not lines:
        raise BadInput(f"{path}: no evaluation in it")
    config = Path(run) / "config.json"
    if config.exists() and lines[-1]["step"] < json.loads(config.read_text())["steps"]:
        lines[-1] = {**lines[-1], "val_loss": math.inf, "bits_per_byte": math.inf}
    return lines


def first_reached(lines, loss: float) -> dict | None:
    """Where the held-out loss first comes down to `loss`: step, flops and seconds, each on the straight line between the
    evaluations around it. None when it never does."""
    if lines[0]["val_loss"] <= loss:
        return lines[0]
    for before, after in zip(lines, lines[1:]):
        if after["val_loss"] <= loss < before["val_loss"]:
            part = (before["val_loss"] - loss) / (before["val_loss"] - after["val_loss"])
            return {k: before[k] + part * (after[k] - before[k]) for k in ("step", "flops", "seconds")}
    return None


def mean_sd(values, digits) -> str:
    """Mean and standard deviation as text; runs that did not finish, with an infinite value, are counted instead."""
    if unfinished := sum(not math.isfinite(v) for v in values):
        return f"{unfinished} of {len(values)} did not finish"
    sd = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{sd}"


def by_name_and_seed(runs) -> dict[str, dict[str, list[dict]]]:
    """Folders NAME-SEED as {name: {seed: evaluations}}, in the order they were given."""
    groups = {}
    for run in runs:
        name, dash, seed = Path(run).name.rpartition("-")
        if not dash or not name:
            raise BadInput(f"{run}: the folder's name has to end in -SEED")
        if seed in groups.setdefault(name, {}):
            raise BadInput(f"{run}: given twice, or two folders of one name")
        groups[name][seed] = read_evaluations(run)
    return groups


def compare(runs) -> str:
    """A table over groups of runs (folders NAME-SEED): final held-out loss, mean ± sd over seeds, and where each comes
    down to the final loss of the first group's run of the same seed, in steps, FLOPs and seconds as a share of that
    run's own. Paired by seed, as two runs of a seed share their initial weights and the order of their data."""
    groups = by_name_and_seed(runs)
    reference = groups[next(iter(groups))]
    rows = ["| run | seeds | held-out nats | minus the first | bits per byte | steps to it | FLOPs to it | seconds to it |",
            "|---|---|---|---|---|---|---|---|"]
    for name, group in groups.items():
        if missing := group.keys() - reference.keys():
            raise BadInput(f"{name}-{min(missing)}: the first group has no run of this seed")
        final = {seed: lines[-1] for seed, lines in group.items()}
        shares = {k: [] for k in ("step", "flops", "seconds")}
        for seed, lines in group.items():
            target = reference[seed][-1]
            if found := first_reached(lines, target["val_loss"]):
                for k, share in shares.items():
                    share.append(100 * found[k] / target[k] if target[k] else 0.0)
        reached = len(shares["step"])
        note = "" if reached == len(group) else f" ({reached} of {len(group)} seeds)"
        rows.append(" | ".join((
            f"| {name}", str(len(group)), mean_sd([f["val_loss"] for f in final.values()], 4),
            mean_sd([f["val_loss"] - reference[seed][-1]["val_loss"] for seed, f in final.items()], 4),
            mean_sd([f["bits_per_byte"] for f in final.values()], 4),
            *((mean_sd(share, 1) + " %" + note) if share else "never" for share in shares.values()))) + " |")
    return "\n".join(rows)


def read_sweep(runs) -> dict[str, dict[float, list[dict]]]:
    """Folders NAME@X-SEED as {name: {X: last evaluations of the seeds}}, X rising."""
    lines = {}
    for name, seeds in by_name_and_seed(runs).items():
        base, at, x = name.rpartition("@")
        try:
            x = float(x)
        except ValueError:
            x = math.nan
        if not (base and 0 < x < math.inf):
            raise BadInput(f"{name}: the folder's name has to be NAME@X-SEED with a positive number X")
        lines.setdefault(base, {}).setdefault(x, []).extend(found[-1] for found in seeds.values())
    return {base: dict(sorted(by_x.items())) for base, by_x in lines.items()}


def geometric_mean(values) -> float:
    return math.exp(statistics.mean(map(math.log, values))) if all(values) else 0.0


def sweep(runs, piece: str, digits=3) -> str:
    """Two tables over X: final held-out loss in nats, mean ± sd over seeds; and RMS W -> RMS W~ of a kind of matrix,
    geometric means."""
    lines = read_sweep(runs)
    xs = sorted({x for by_x in lines.values() for x in by_x})
    head = ["| run | " + " | ".join(f"{x:g}" for x in xs) + " |", "|---" * (1 + len(xs)) + "|"]
    losses, scales = list(head), list(head)
    for base, by_x in lines.items():
        cells = {x: mean_sd([f["val_loss"] for f in finals], digits) for x, finals in by_x.items()}
        losses.append(f"| {base} | " + " | ".join(cells.get(x, "") for x in xs) + " |")
        cells = {x: " → ".join(f"{geometric_mean(weight_rms(finals, piece, key)):.3g}" for key in ("rms", "rms_effective"))
                 for x, finals in by_x.items()}
        scales.append(f"| {base} | " + " | ".join(cells.get(x, "") for x in xs) + " |")
    return "\n".join(["held-out loss", "", *losses, "", f"RMS of {piece}: W → W~", "", *scales])


def weight_rms(finals, piece: str, key: str) -> list[float]:
    try:
        return [f["weights"][piece][key] for f in finals]
    except KeyError:
        raise BadInput(f"--piece={piece}: no such kind of matrix in these runs") from None


def plot_sweep(runs, piece: str, path: str):
    """The tables of `sweep` as a picture: loss over X with the standard deviation, RMS W (dashed) and W~ over X."""
    try:
        import matplotlib
    except ImportError:
        raise BadInput("--plot: needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for i, (base, by_x) in enumerate(read_sweep(runs).items()):
        losses = [[f["val_loss"] for f in finals] for finals in by_x.values()]
        losses = [[v for v in found if math.isfinite(v)] or [math.nan] for found in losses]
        left.errorbar(list(by_x), [statistics.mean(v) for v in losses], label=base, color=f"C{i}", marker="o", capsize=3,
                      yerr=[statistics.stdev(v) if len(v) > 1 else 0 for v in losses])
        for key, style in (("rms", "--"), ("rms_effective", "-")):
            right.plot(list(by_x), [geometric_mean(weight_rms(f, piece, key)) for f in by_x.values()], style, color=f"C{i}",
                       marker="o", label=f"{base}, {'W~' if style == '-' else 'W'}")
    left.set(xscale="log", xlabel="X", ylabel="held-out loss, nats", title="final loss, mean and sd over seeds")
    right.set(xscale="log", yscale="log", xlabel="X", ylabel=f"RMS of {piece}", title=f"{piece}: W dashed, W~ solid")
    left.legend()
    right.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main(argv):
    parser = argparse.ArgumentParser(prog="probes.py", description="Tables and pictures over runs of train.py.")
    commands = parser.add_subparsers(dest="command", required=True)
    c = commands.add_parser("compare", help="final losses, and where each run reaches the first one's")
    c.add_argument("runs", nargs="+", help="folders of runs, named NAME-SEED; the first NAME is the reference")
    s = commands.add_parser("sweep", help="final loss and weight scale over X")
    s.add_argument("runs", nargs="+", help="folders of runs, named NAME@X-SEED")
    s.add_argument("--piece", default="head", help="kind of matrix whose RMS is shown")
    s.add_argument("--plot", default="", help="also write a picture to this file")
    a = parser.parse_args(argv)
    if a.command == "sweep" and a.plot and Path(a.plot).suffix not in (".png", ".pdf", ".svg"):
        raise BadInput(f"--plot={a.plot}: a name that ends in .png, .pdf or .svg is needed")
    if a.command == "compare":
        print(compare(a.runs))
    else:
        print(sweep(a.runs, a.piece))
        if a.plot:
            plot_sweep(a.runs, a.piece, a.plot)


if __name__ == "__main__":
    command(main)
