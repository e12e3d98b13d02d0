"""teacher.py: what a frozen, already trained model can teach. Loading teachers, and LET.

Late-to-early training (LET, Zhao et al. 2026, arXiv 2602.05393): a small pretrained teacher T reads the same tokens as
the larger student M. T's *late* state guides one of M's *early* blocks, and only *early* in training:

    L(s) = L_NLL + lambda(s) * L_proj,    L_proj = -mean over tokens of cos(h_M^(k), h_T^(L_T)),
    lambda(s) = lambda_0 * max(0, (S_stop - s) / S_stop)

Only texts derived from the paper could be read. Where they are silent or disagree, the choice is a flag of train.py and
its docstring here says so.

Names and symbols
    M, T                student and teacher; d_M, d_T their widths
    h_M^(k)             let_student_layer: M's residual stream after block k, before any norm; (B, T, d_M)
    h_T^(L_T)           let_teacher_layer: T's state after its last block; -1 counts from the end; (B, T, d_T)
    lambda_0, S_stop    let_weight, let_stop (in optimizer steps here; train.py also takes a fraction of the run)
    s                   optimizer steps taken so far, from 0
    L_proj              let_loss: `cosine`, or `logsum` (Miles & Mikolajczyk 2023, arXiv 2303.11098)
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from model import BadInput, load_checkpoint, model_from_checkpoint, tokenizer_id


def load_teacher(path, tokenizer: dict, block_size: int, device="cpu"):
    """A checkpoint of ours as a frozen model in eval mode. Raises BadInput when it reads other tokens than the
    student's `tokenizer`, or when its context is shorter than the student's block_size: position t of one could then
    not be held against position t of the other."""
    ckpt = load_checkpoint(path, flag="--teacher=")
    if tokenizer_id(ckpt["tokenizer"]) != tokenizer_id(tokenizer):
        raise BadInput(f"--teacher={path}: its tokenizer ({ckpt['tokenizer']['name']}, {tokenizer_id(ckpt['tokenizer'])}) "
                       f"is not the student's ({tokenizer['name']}, {tokenizer_id(tokenizer)}); LET matches token by token")
    if ckpt["model_config"]["block_size"] < block_size:
        raise BadInput(f"--teacher={path}: its context of {ckpt['model_config']['block_size']} tokens is shorter than the "
                       f"student's --block_size={block_size}")
    return model_from_checkpoint(ckpt, device).eval().requires_grad_(False)


def let_weight(step: int, weight: float, stop: int) -> float:
    """lambda(s) = lambda_0 * max(0, (S_stop - s) / S_stop): falls linearly, is 0 from step S_stop on."""
    return weight * max(0, stop - step) / stop if stop > 0 else 0.0


def interpolate(h, width: int):
    """Resize the feature axis by linear interpolation, without parameters. h: (..., d) -> (..., width).

    Output j reads position x_j = max(0, (j + 0.5) d / width - 0.5), between its two neighbours in proportion. That
    features next to each other mean anything is not claimed: it is what the paper is reported to do."""
    if h.shape[-1] == width:
        return h
    return F.interpolate(h.flatten(0, -2)[:, None], size=width, mode="linear", align_corners=False).view(
        *h.shape[:-1], width)


def cosine_loss(student, teacher):
    """(L_proj, cosine), both 0-d: minus the mean cosine over tokens, in float32. student, teacher: (B, T, d)."""
    cos = F.cosine_similarity(student.float(), teacher.float(), dim=-1).mean()
    return -cos, cos


def logsum_loss(student, teacher, power: float = 4.0, eps: float = 1e-5):
    """(L_proj, cosine): log of the mean of |BN(student) - BN(teacher)|^power over tokens and features, in float32.

    BN is batch norm without gain or bias, over all tokens of the micro-batch. The paper's own normalisation is not
    known; this is the cited authors', but for the mean in place of the sum, which only shifts the log."""
    normed = [F.batch_norm(h.float().flatten(0, -2), None, None, training=True, eps=eps) for h in (student, teacher)]
    loss = ((normed[0] - normed[1]).abs() ** power).mean().log()
    return loss, cosine_loss(student.detach(), teacher)[1]


LET_LOSSES = {"cosine": cosine_loss, "logsum": logsum_loss}


class LET(nn.Module):
    """The teacher's side of late-to-early training, and the learned projection where one is asked for.

    teacher: a frozen GPT. teacher_layer: a block number, negative from the end. norm: pass its state through its
    final norm (what Hugging Face calls the last hidden state; the paper does not say). resize: how the widths are
    brought together when they differ, `interpolate` or `project` (a learned linear map, trained along with the
    student and dropped with the teacher); side: which of the two is resized, `teacher` (what is reported of
    the paper) or `student` (where a learned map cannot collapse the target)."""

    def __init__(self, teacher, student_width: int, teacher_layer=-1, norm=True, loss="cosine", resize="interpolate",
                 side="teacher"):
        super().__init__()
        # In a list, so that the teacher is no submodule: its weights are neither trained nor saved with the run.
        self._teacher = [teacher]
        n_layer, d_T = teacher.config.n_layer, teacher.config.n_embd
        self.teacher_layer = teacher_layer + n_layer + 1 if teacher_layer < 0 else teacher_layer
        if not 0 <= self.teacher_layer <= n_layer:
            raise BadInput(f"--let_teacher_layer={teacher_layer}: the teacher has blocks 1 to {n_layer}")
        self.norm, self.side, self.loss = norm, side, LET_LOSSES[loss]
        self.width = student_width if side == "teacher" else d_T
        self.projection = None
        if resize == "project":
            self.projection = nn.Linear(*((d_T, student_width) if side == "teacher" else (student_width, d_T)),
                                        bias=False)

    @torch.no_grad()
    def teach(self, idx):
        """h_T: (B, T, d_T) for token ids idx (B, T). Blocks after the asked one, and the head, are not run."""
        teacher = self._teacher[0]
        h, _ = teacher.trunk(idx, blocks=self.teacher_layer)
        return teacher.norm(h) if self.norm else h

    def forward(self, h_M, h_T):
        """(L_proj, mean cosine), 0-d each. h_M: (B, T, d_M) from the student, h_T: (B, T, d_T) from teach()."""
        resized = (lambda h: self.projection(h)) if self.projection else (lambda h: interpolate(h, self.width))
        if self.side == "teacher":
            return self.loss(h_M, resized(h_T))
        return self.loss(resized(h_M), h_T)

    def compile_teacher(self):
        self._teacher[0].trunk = torch.compile(self._teacher[0].trunk, dynamic=False)

    def average_gradients(self):
        """The projection is no part of the model that DDP looks after: its gradients are averaged here."""
        if dist.is_initialized():
            for p in self.parameters():
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()

    def flops_per_token(self, length: int) -> int:
        """The teacher's forward pass on sequences of this length, and the projection's forward and backward."""
        forward = self._teacher[0].flops_per_token(backward=False, head=False, blocks=self.teacher_layer, length=length)
        return forward + (6 * self.projection.weight.numel() if self.projection else 0)
