"""Plain-PyTorch definition of every op: what a faster kernel must equal, and the path that any device takes.

Shapes: B batch, T tokens, I input features, O output features, R rank, N supervised positions, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SCALE_FLOOR = 1e-12


def low_rank(x: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, *, scaling: float) -> torch.Tensor:
    """scaling * x A^T B^T: what LoRA adds to x W^T (Hu et al., 2021, arXiv 2106.09685, equation 3).

    x [..., I], whose dtype is also the result's [..., O]; lora_a [R, I] and lora_b [O, R] are the fp32 masters: B is
    scaled in fp32 and both are cast to x's dtype for the products.
    """
    h = F.linear(x, lora_a.to(x.dtype))
    return F.linear(h, (lora_b * scaling).to(x.dtype))


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The summed negative log-likelihood in nats, fp32: logits [N, V] of any float dtype, targets [N] int64.

    A sum, since the step divides by the unmasked tokens of all its micro-batches together. With weights [N] fp32 each
    row counts as often as it weighs.
    """
    if weights is None:
        return F.cross_entropy(logits.float(), targets, reduction="sum")
    return (F.cross_entropy(logits.float(), targets, reduction="none") * weights).sum()


class Rows(NamedTuple):
    """A site's input as its products read it, row by row.

    dense [M, I] in the model's dtype, or quantised [M, I] e4m3 with scale [M, 1] fp32 (values = quantised * scale);
    low [M, R] is the input's projection on the adapter's rank; rstd [M] fp32 is there after a normalisation.
    """

    dense: torch.Tensor | None
    quantised: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    low: torch.Tensor | None = None
    rstd: torch.Tensor | None = None


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, I] -> e4m3 [M, I] and fp32 scale [M, 1]: a row's largest magnitude becomes 448, e4m3's largest."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=SCALE_FLOOR) / FP8_MAX
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def project_rows(
    x: torch.Tensor,
    *,
    factor: torch.Tensor | None = None,
    down: torch.Tensor | None = None,
    segments: tuple[int, ...] = (),
    eps: float | None = None,
    quantise: bool = False,
    largest: torch.Tensor | None = None,
) -> Rows:
    """z = x * factor, after RMS normalisation when `eps` is given; its e4m3 form; and its projection.

    x [M, I]; factor [I]; down [I, R]. `segments` are the ends of the column ranges that are projected apart:
    low[:, j R : (j+1) R] = x[:, segment j] down[segment j]. With `eps`, low is of z; without it, of x. Rows.dense is
    z, or None when z is quantised. `largest` [M] fp32, the rows' largest magnitudes of z, spares a kernel a reading.
    """
    work = x if x.dtype == torch.float64 else x.float()
    rstd = None
    z = work if factor is None else work * factor
    if eps is not None:
        rstd = torch.rsqrt(work.square().mean(-1) + eps)
        z = z * rstd[:, None]
    low = None
    if down is not None:
        source = z.to(x.dtype) if eps is not None else x
        starts = (0, *segments[:-1])
        low = torch.cat([source[:, a:b] @ down[a:b] for a, b in zip(starts, segments, strict=True)], 1)
    if quantise:
        return Rows(None, *quantise_rows(z), low, rstd)
    return Rows(z.to(x.dtype), None, None, low, rstd)


def rank_gradient(dy: torch.Tensor, low: torch.Tensor, ends: tuple[int, ...]) -> torch.Tensor:
    """dy^T low, segment by segment: dy [M, O], low [M, n R] -> [O, R]; sum and result in fp32 (float64 stays).

    `ends` are the ends of the n column ranges of dy; range j meets low[:, j R : (j+1) R].
    """
    rank = low.shape[1] // len(ends)
    starts = (0, *ends[:-1])
    ranges = enumerate(zip(starts, ends, strict=True))
    parts = [product32(dy[:, a:b].T, low[:, j * rank : (j + 1) * rank]) for j, (a, b) in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def product32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b in fp32 (float64 stays)."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).to(torch.promote_types(a.dtype, torch.float32))


def norm_backward(
    dz: torch.Tensor,
    x: torch.Tensor,
    *,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    low: torch.Tensor | None,
    down: torch.Tensor | None,
    projected: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradient of x for z = weight * x * rstd, with dz [M, I] + low [M, R] down [R, I] arriving, plus `residual`.

    Also low^T z [R, I], fp32: the gradient of `down`. `projected` is z down^T [M, R], which a kernel needs.
    """
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    grad = dz.to(work)
    down_grad = None
    if low is not None and down is not None:
        grad = grad + low.to(work) @ down.to(work)
        # dA = ((low * rstd)^T x) * weight: z is not formed again.
        down_grad = rank_gradient((low * rstd[:, None]).to(x.dtype), x, (low.shape[1],)) * weight
    unit = x.to(work) * rstd[:, None]
    grad = grad * weight.to(work)
    dx = rstd[:, None] * (grad - unit * (grad * unit).mean(-1, keepdim=True))
    return (dx if residual is None else dx + residual).to(x.dtype), down_grad


def add_low_rank(
    residual: torch.Tensor, y: torch.Tensor, low: torch.Tensor | None, up: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """residual + y + low up^T, [M, O]; low [M, R], up [O, R]."""
    work = torch.float64 if y.dtype == torch.float64 else torch.float32
    total = residual.to(work) + y.to(work)
    if low is not None and up is not None:
        total = total + low.to(work) @ up.to(work).T
    return total.to(y.dtype)


class Heads(NamedTuple):
    """Columns of a q/k/v product: num_q query heads, then num_kv key heads, then as many value heads, of `size`."""

    num_q: int
    num_kv: int
    size: int

    @property
    def ends(self) -> tuple[int, int, int]:
        q, kv = self.num_q * self.size, self.num_kv * self.size
        return (q, q + kv, q + 2 * kv)


class Rotation(NamedTuple):
    """What turns a q/k/v product into q, k, v: cos, sin [M, D/2] fp32, bias [O], q_norm and k_norm [D], their eps."""

    cos: torch.Tensor
    sin: torch.Tensor
    bias: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    eps: float = 0.0


def _raw_heads(
    qkv: torch.Tensor, low: torch.Tensor | None, up: torch.Tensor | None, heads: Heads, rotation: Rotation
) -> list[torch.Tensor]:
    work = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    parts = list(qkv.to(work).tensor_split(list(heads.ends[:2]), dim=1))
    starts = (0, *heads.ends[:2])
    for j, (a, b) in enumerate(zip(starts, heads.ends, strict=True)):
        if low is not None and up is not None:
            rank = up.shape[1]
            parts[j] = parts[j] + low[:, j * rank : (j + 1) * rank].to(work) @ up[a:b].to(work).T
        if rotation.bias is not None:
            parts[j] = parts[j] + rotation.bias[a:b]
    return [part.view(part.shape[0], -1, heads.size) for part in parts]


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def rotate(
    qkv: torch.Tensor, low: torch.Tensor | None, up: torch.Tensor | None, heads: Heads, rotation: Rotation,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """q [M, num_q, D], k, v [M, num_kv, D] from qkv [M, O]: low-rank part and bias added, q and k normalised, turned.

    Su et al., 2021, arXiv 2104.09864, in the half-split form of LLaMA's released code.
    """
    q, k, v = _raw_heads(qkv, low, up, heads, rotation)
    out = []
    for x, norm in ((q, rotation.q_norm), (k, rotation.k_norm)):
        if norm is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + rotation.eps) * norm
        out.append(_turn(x, rotation.cos, rotation.sin).to(qkv.dtype))
    return out[0], out[1], v.to(qkv.dtype)


def rotate_backward(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    qkv: torch.Tensor | None,
    low: torch.Tensor | None,
    up: torch.Tensor | None,
    heads: Heads,
    rotation: Rotation,
    factor: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The gradient of the sum that `rotate` starts from, [M, O]; qkv is read where q and k are normalised alone.

    With `factor` [O], also the rows' largest magnitudes of gradient * factor, [M]; with `low` the gradient of `up`,
    fp32 [O, R].
    """
    dtype = grads[0].dtype
    work = torch.float64 if dtype == torch.float64 else torch.float32
    turned = [_turn(g.to(work), rotation.cos, -rotation.sin) for g in grads[:2]]
    if qkv is not None and rotation.q_norm is not None:
        raw = _raw_heads(qkv, low, up, heads, rotation)
        for j, norm in enumerate((rotation.q_norm, rotation.k_norm)):
            assert norm is not None
            rstd = torch.rsqrt(raw[j].square().mean(-1, keepdim=True) + rotation.eps)
            unit, grad = raw[j] * rstd, turned[j] * norm
            turned[j] = rstd * (grad - unit * (grad * unit).mean(-1, keepdim=True))
    whole = torch.cat([g.flatten(1).to(dtype) for g in (*turned, grads[2])], 1)
    largest = None if factor is None else (whole * factor).abs().amax(1)
    return whole, largest, None if low is None else rank_gradient(whole, low, heads.ends)


def swiglu(
    gate_up: torch.Tensor,
    low: torch.Tensor | None,
    up: torch.Tensor | None,
    *,
    down: torch.Tensor | None,
    quantise: bool,
) -> Rows:
    """h = silu(g) * u (Shazeer, 2020, arXiv 2002.05202) with g, u the halves of gate_up + low-rank part; as `Rows`.

    gate_up [M, 2F]; low [M, 2R]; up [2F, R]; down [F, R'], the next site's projection.
    """
    g, u = _gate_up(gate_up, low, up)
    h = (g * torch.sigmoid(g) * u).to(gate_up.dtype)
    return project_rows(h, down=down, segments=(h.shape[1],), quantise=quantise)


def _gate_up(
    gate_up: torch.Tensor, low: torch.Tensor | None, up: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    work = torch.float64 if gate_up.dtype == torch.float64 else torch.float32
    g, u = gate_up.to(work).chunk(2, dim=1)
    if low is not None and up is not None:
        low_g, low_u = low.to(work).chunk(2, dim=1)
        up_g, up_u = up.to(work).T.chunk(2, dim=1)
        g, u = g + low_g @ up_g, u + low_u @ up_u
    return g, u


class SwigluGrads(NamedTuple):
    """The gradient [M, 2F] of gate and up as `Rows` for dX, and those of `up` [2F, R] and of `down` [R', F], fp32."""

    rows: Rows
    up: torch.Tensor | None
    down: torch.Tensor | None


def swiglu_backward(
    dh: torch.Tensor,
    gate_up: torch.Tensor,
    low: torch.Tensor | None,
    up: torch.Tensor | None,
    *,
    low_dh: torch.Tensor | None,
    down: torch.Tensor | None,
    factor: torch.Tensor | None,
    quantise: bool,
) -> SwigluGrads:
    """Backward of `swiglu`: the arriving gradient is dh [M, F] + low_dh [M, R'] down [R', F].

    Rows.low is the gradient's projection on `up`, [M, 2R]. dh and gate_up may be overwritten.
    """
    g, u = _gate_up(gate_up, low, up)
    grad = dh.to(g.dtype)
    if low_dh is not None and down is not None:
        grad = grad + low_dh.to(g.dtype) @ down.to(g.dtype)
    sigmoid = torch.sigmoid(g)
    h = g * sigmoid * u
    d_gate = grad * u * sigmoid * (1 + g * (1 - sigmoid))
    d_both = torch.cat([d_gate, grad * g * sigmoid], 1).to(dh.dtype)
    half = dh.shape[1]
    rows = project_rows(d_both, factor=factor, down=up, segments=(half, 2 * half), quantise=quantise)
    up_grad = None if low is None else rank_gradient(d_both, low, (half, 2 * half))
    h = h.to(dh.dtype)
    down_grad = None if low_dh is None else rank_gradient(low_dh, h, (low_dh.shape[1],))
    return SwigluGrads(rows, up_grad, down_grad)


def cross_entropy_rows(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each row, fp32 [N]; logits [N, V] are overwritten by their gradient, p - onehot.

    A row whose target is negative has neither loss nor gradient.
    """
    counts = targets >= 0
    targets = targets.clamp(min=0)
    work = logits if logits.dtype == torch.float64 else logits.float()
    log_p = work.log_softmax(-1)
    losses = -log_p.gather(1, targets[:, None])[:, 0]
    grad = log_p.exp_().scatter_add_(1, targets[:, None], torch.full_like(losses[:, None], -1.0))
    logits.copy_(grad * counts[:, None])
    return losses * counts
