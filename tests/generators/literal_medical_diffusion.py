"""Medical Diffusion once more, as literally as it is described: plain functions on upstream state dicts.

Written from the description of the format alone, without sight of `diffaug.generators`; what both agree on is
probably what the description says.
"""

import math

import torch
import torch.nn.functional as F


# -- VQ-GAN (section 4)
def samepad(x, k, s, mode="replicate"):
    pads = []
    for kk, ss in list(zip(k, s, strict=True))[::-1]:
        p = kk - ss
        pads += [p // 2 + p % 2, p // 2]
    return F.pad(x, pads, mode=mode) if any(pads) else x


def conv(sd, name, x, s=(1, 1, 1), mode="replicate"):
    w, b = sd[name + ".conv.weight"], sd[name + ".conv.bias"]
    return F.conv3d(samepad(x, w.shape[2:], s, mode), w, b, stride=s)


def convt(sd, name, x, s):
    w, b = sd[name + ".convt.weight"], sd[name + ".convt.bias"]
    k = w.shape[2:]
    return F.conv_transpose3d(samepad(x, k, s), w, b, stride=s, padding=tuple(i - 1 for i in k))


def gn6(sd, name, x, groups):
    return F.group_norm(x, groups, sd[name + ".weight"], sd[name + ".bias"], eps=1e-6)


def vres(sd, name, x, g):
    h = conv(sd, name + ".conv1", F.silu(gn6(sd, name + ".norm1", x, g)))
    h = conv(sd, name + ".conv2", F.silu(gn6(sd, name + ".norm2", h, g)))
    return x + h


def stage_strides(factors):
    rest = [int(math.log2(f)) for f in factors]
    out = []
    for _ in range(max(rest)):
        out.append(tuple(2 if r > 0 else 1 for r in rest))
        rest = [r - 1 for r in rest]
    return out


def encode(sd, x, factors, groups=32, mode="replicate"):
    h = conv(sd, "encoder.conv_first", x, mode=mode)
    for i, s in enumerate(stage_strides(factors)):
        h = conv(sd, f"encoder.conv_blocks.{i}.down", h, s, mode)
        h = vres(sd, f"encoder.conv_blocks.{i}.res", h, groups)
    h = F.silu(gn6(sd, "encoder.final_block.0", h, groups))
    return conv(sd, "pre_vq_conv", h, mode=mode)


def quantise(sd, z):
    e = sd["codebook.embeddings"]
    B, D = z.shape[:2]
    flat = z.movedim(1, -1).reshape(-1, D)
    dist = (flat**2).sum(1, keepdim=True) - 2 * flat @ e.t() + (e.t() ** 2).sum(0, keepdim=True)
    return dist.argmin(1).view(B, *z.shape[2:]), dist


def lookup(sd, idx):
    return F.embedding(idx, sd["codebook.embeddings"]).movedim(-1, 1)


def decode_vectors(sd, e, factors, groups=32):
    h = conv(sd, "post_vq_conv", e)
    h = F.silu(gn6(sd, "decoder.final_block.0", h, groups))
    for i, s in enumerate(stage_strides(factors)):
        h = convt(sd, f"decoder.conv_blocks.{i}.up", h, s)
        h = vres(sd, f"decoder.conv_blocks.{i}.res1", h, groups)
        h = vres(sd, f"decoder.conv_blocks.{i}.res2", h, groups)
    return conv(sd, "decoder.conv_last", h)


def decode(sd, z, factors, groups=32):
    return decode_vectors(sd, lookup(sd, quantise(sd, z)[0]), factors, groups)


# -- codebook training (4.3); `picker(y, K)` returns K random rows
def tile(flat, K):
    n, D = flat.shape
    if n < K:
        flat = flat.repeat((K + n - 1) // n, 1)
        flat = flat + torch.randn_like(flat) * 0.01 / math.sqrt(D)
    return flat


def pick(flat, K):
    y = tile(flat, K)
    return y[torch.randperm(y.shape[0])][:K]


def codebook_init(cb, z, pick=pick):
    K, D = cb["embeddings"].shape
    v = pick(z.movedim(1, -1).reshape(-1, D), K)
    return {"embeddings": v.clone(), "z_avg": v.clone(), "N": torch.ones(K, dtype=v.dtype)}


def codebook_forward(cb, z, pick=pick, training=True):
    """Returns (straight-through vectors, idx, commitment loss, perplexity, new buffers)."""
    K, D = cb["embeddings"].shape
    flat = z.detach().movedim(1, -1).reshape(-1, D)
    idx, _ = quantise({"codebook.embeddings": cb["embeddings"]}, z.detach())
    e = F.embedding(idx, cb["embeddings"]).movedim(-1, 1)
    loss = 0.25 * ((z - e.detach()) ** 2).mean()
    onehot = F.one_hot(idx.flatten(), K).type_as(flat)
    p = onehot.mean(0)
    ppl = torch.exp(-(p * torch.log(p + 1e-10)).sum())
    new = dict(cb)
    if training:
        N = 0.99 * cb["N"] + 0.01 * onehot.sum(0)
        z_avg = 0.99 * cb["z_avg"] + 0.01 * (onehot.t() @ flat)
        w = (N + 1e-7) / (N.sum() + K * 1e-7) * N.sum()
        emb = z_avg / w[:, None]
        v = pick(flat, K)
        emb = torch.where((N < 1.0)[:, None], v, emb)
        new = {"N": N, "z_avg": z_avg, "embeddings": emb}
    st = (e - z).detach() + z
    return st, idx, loss, ppl, new


# -- latent scaling (5)
def ends(sd):
    e = sd["codebook.embeddings"]
    return e.min(), e.max()


def scale(sd, z):
    low, high = ends(sd)
    return 2 * (z - low) / (high - low) - 1


def unscale(sd, zn):
    low, high = ends(sd)
    return (zn + 1) / 2 * (high - low) + low


# -- U-Net (6)
def sinusoid(t, dim, dtype):
    f = torch.tensor([math.exp(-i * math.log(1e4) / (dim // 2 - 1)) for i in range(dim // 2)], dtype=dtype)
    a = t.to(dtype)[:, None] * f[None]
    return torch.cat([a.sin(), a.cos()], 1)


def bucket(d):
    a = abs(d)
    b = a if a < 8 else min(15, 8 + int(8 * math.log(a / 8) / math.log(32 / 8)))
    return b + (16 if d > 0 else 0)


def rel_bias(table, f):
    idx = torch.tensor([[bucket(k - q) for k in range(f)] for q in range(f)])
    return table[idx].permute(2, 0, 1)  # heads, query, key


def rotary(x):  # ..., f, d
    f, d = x.shape[-2:]
    rd = min(32, d)
    out = x.clone()
    for k in range(rd // 2):
        th = torch.arange(f, dtype=x.dtype) * 10000.0 ** (-2 * k / rd)
        a, b = x[..., 2 * k], x[..., 2 * k + 1]
        out[..., 2 * k] = a * th.cos() - b * th.sin()
        out[..., 2 * k + 1] = b * th.cos() + a * th.sin()
    return out


def prenorm(sd, name, x):
    mean = x.mean(1, keepdim=True)
    var = ((x - mean) ** 2).mean(1, keepdim=True)
    return (x - mean) / torch.sqrt(var + 1e-5) * sd[name + ".fn.norm.gamma"]


def attn(sd, name, x, heads, bias=None, rot=False):  # x: N, L, C
    qkv = x @ sd[name + ".to_qkv.weight"].t()
    q, k, v = [y.reshape(*y.shape[:2], heads, -1).transpose(1, 2) for y in qkv.chunk(3, -1)]
    q = q * q.shape[-1] ** -0.5
    if rot:
        q, k = rotary(q), rotary(k)
    s = q @ k.transpose(-1, -2)
    if bias is not None:
        s = s + bias
    o = s.softmax(-1) @ v
    return o.transpose(1, 2).reshape(*x.shape[:2], -1) @ sd[name + ".to_out.weight"].t()


def depth_attn(sd, name, x, bias, heads):
    B, C, f, h, w = x.shape
    y = prenorm(sd, name, x).permute(0, 3, 4, 2, 1).reshape(B * h * w, f, C)
    y = attn(sd, name + ".fn.fn.fn", y, heads, bias, True)
    return x + y.reshape(B, h, w, f, C).permute(0, 4, 3, 1, 2)


def mid_attn(sd, name, x, heads):
    B, C, f, h, w = x.shape
    y = prenorm(sd, name, x).permute(0, 2, 3, 4, 1).reshape(B * f, h * w, C)
    y = attn(sd, name + ".fn.fn.fn", y, heads)
    return x + y.reshape(B, f, h, w, C).permute(0, 4, 1, 2, 3)


def linear_attn(sd, name, x, heads):
    B, C, f, h, w = x.shape
    y = prenorm(sd, name, x).permute(0, 2, 1, 3, 4).reshape(B * f, C, h, w)
    qkv = F.conv2d(y, sd[name + ".fn.fn.to_qkv.weight"])
    q, k, v = [z.reshape(B * f, heads, 32, h * w) for z in qkv.chunk(3, 1)]
    q = q.softmax(2) * 32**-0.5
    k = k.softmax(3)
    ctx = torch.einsum("bhdn,bhen->bhde", k, v)
    o = torch.einsum("bhde,bhdn->bhen", ctx, q).reshape(B * f, heads * 32, h, w)
    o = F.conv2d(o, sd[name + ".fn.fn.to_out.weight"], sd[name + ".fn.fn.to_out.bias"])
    return x + o.reshape(B, f, C, h, w).permute(0, 2, 1, 3, 4)


def ublock(sd, name, x, groups, ss=None):
    h = F.conv3d(x, sd[name + ".proj.weight"], sd[name + ".proj.bias"], padding=(0, 1, 1))
    h = F.group_norm(h, groups, sd[name + ".norm.weight"], sd[name + ".norm.bias"])
    if ss is not None:
        h = h * (ss[0] + 1) + ss[1]
    return F.silu(h)


def ures(sd, name, x, groups, t=None):
    ss = None
    if t is not None:
        m = F.silu(t) @ sd[name + ".mlp.1.weight"].t() + sd[name + ".mlp.1.bias"]
        ss = m[:, :, None, None, None].chunk(2, 1)
    h = ublock(sd, name + ".block1", x, groups, ss)
    h = ublock(sd, name + ".block2", h, groups)
    if name + ".res_conv.weight" in sd:
        x = F.conv3d(x, sd[name + ".res_conv.weight"], sd[name + ".res_conv.bias"])
    return h + x


def unet(full, x, t, groups=8):
    sd = {k[len("denoise_fn.") :]: v for k, v in full.items() if k.startswith("denoise_fn.")}
    table = sd["time_rel_pos_bias.relative_attention_bias.weight"]
    heads = table.shape[1]
    dim = sd["init_conv.weight"].shape[0]
    levels = 1 + max(int(k.split(".")[1]) for k in sd if k.startswith("downs."))
    bias = rel_bias(table, x.shape[2])
    kk = sd["init_conv.weight"].shape[-1] // 2
    x = F.conv3d(x, sd["init_conv.weight"], sd["init_conv.bias"], padding=(0, kk, kk))
    r = x.clone()
    x = depth_attn(sd, "init_temporal_attn", x, bias, heads)
    e = sinusoid(t, dim, x.dtype)
    e = F.gelu(e @ sd["time_mlp.1.weight"].t() + sd["time_mlp.1.bias"])
    e = e @ sd["time_mlp.3.weight"].t() + sd["time_mlp.3.bias"]
    skips = []
    for i in range(levels):
        n = f"downs.{i}"
        x = ures(sd, n + ".0", x, groups, e)
        x = ures(sd, n + ".1", x, groups, e)
        x = linear_attn(sd, n + ".2", x, heads)
        x = depth_attn(sd, n + ".3", x, bias, heads)
        skips.append(x)
        if n + ".4.weight" in sd:
            x = F.conv3d(x, sd[n + ".4.weight"], sd[n + ".4.bias"], stride=(1, 2, 2), padding=(0, 1, 1))
    x = ures(sd, "mid_block1", x, groups, e)
    x = mid_attn(sd, "mid_spatial_attn", x, heads)
    x = depth_attn(sd, "mid_temporal_attn", x, bias, heads)
    x = ures(sd, "mid_block2", x, groups, e)
    for i in range(levels):
        n = f"ups.{i}"
        x = torch.cat([x, skips.pop()], 1)
        x = ures(sd, n + ".0", x, groups, e)
        x = ures(sd, n + ".1", x, groups, e)
        x = linear_attn(sd, n + ".2", x, heads)
        x = depth_attn(sd, n + ".3", x, bias, heads)
        if n + ".4.weight" in sd:
            x = F.conv_transpose3d(
                x, sd[n + ".4.weight"], sd[n + ".4.bias"], stride=(1, 2, 2), padding=(0, 1, 1)
            )
    x = torch.cat([x, r], 1)
    x = ures(sd, "final_conv.0", x, groups)
    return F.conv3d(x, sd["final_conv.1.weight"], sd["final_conv.1.bias"])


# -- diffusion (7)
def schedule(T, dtype=torch.float32):
    x = torch.arange(T + 1, dtype=torch.float64)
    a = torch.cos(((x / T + 0.008) / 1.008) * math.pi / 2) ** 2
    a = a / a[0]
    b = (1 - a[1:] / a[:-1]).clamp(0, 0.9999)
    al = 1 - b
    ac = al.cumprod(0)
    ap = torch.cat([torch.ones(1, dtype=torch.float64), ac[:-1]])
    pv = b * (1 - ap) / (1 - ac)
    d = {
        "betas": b,
        "alphas_cumprod": ac,
        "alphas_cumprod_prev": ap,
        "sqrt_alphas_cumprod": ac.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - ac).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - ac).log(),
        "sqrt_recip_alphas_cumprod": (1 / ac).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / ac - 1).sqrt(),
        "posterior_variance": pv,
        "posterior_log_variance_clipped": pv.clamp(min=1e-20).log(),
        "posterior_mean_coef1": b * ap.sqrt() / (1 - ac),
        "posterior_mean_coef2": (1 - ap) * al.sqrt() / (1 - ac),
    }
    return {k: v.to(torch.float32).to(dtype) for k, v in d.items()}


def q_sample(s, x0, t, noise):
    return s["sqrt_alphas_cumprod"][t] * x0 + s["sqrt_one_minus_alphas_cumprod"][t] * noise


def ancestral(sd, x, draw, start=None, cond=None, groups=8, trace=None):
    """From x at index `start` (default T-1) down to 0; `draw()` gives one noise tensor."""
    s = sd
    T = len(s["betas"])
    for t in range(T - 1 if start is None else start, -1, -1):
        inp = x if cond is None else torch.cat([x, cond], 1)
        eps = unet(sd, inp, torch.full((x.shape[0],), t), groups)
        x0 = (s["sqrt_recip_alphas_cumprod"][t] * x - s["sqrt_recipm1_alphas_cumprod"][t] * eps).clamp(-1, 1)
        mean = s["posterior_mean_coef1"][t] * x0 + s["posterior_mean_coef2"][t] * x
        x = mean
        if t > 0:
            x = mean + (0.5 * s["posterior_log_variance_clipped"][t]).exp() * draw()
        if trace is not None:
            trace.append(x)
    return x


# -- DiffTumor (9.1)
def difftumor_to_net(x):
    return x.permute(0, 1, -1, -3, -2)


def difftumor_condition(vq, image, mask, factors=(4, 4, 4), groups=32):
    """image in [-1,1], mask in {0,1}; both (B,1,X,Y,Z). Returns 9-channel condition in net axes."""
    masked = difftumor_to_net(image * (1 - mask))
    lat = scale(vq, encode(vq, masked, factors, groups))
    m = F.interpolate(difftumor_to_net(mask * 2 - 1), size=lat.shape[2:], mode="nearest")
    return torch.cat([lat, m], 1)


def ddim(sd, x, cond, steps=50, groups=8, trace=None):
    ac = sd["alphas_cumprod"]
    T = len(ac)
    ts = [i + 1 for i in range(0, T, T // steps)]
    assert len(ts) == steps
    prev = [ac[0]] + [ac[t] for t in ts[:-1]]
    for t, a_prev in list(zip(ts, prev, strict=True))[::-1]:
        inp = torch.cat([x, cond], 1)
        eps = unet(sd, inp, torch.full((x.shape[0],), t), groups)
        x0 = (x - (1 - ac[t]).sqrt() * eps) / ac[t].sqrt()
        x = a_prev.sqrt() * x0 + (1 - a_prev).sqrt() * eps
        if trace is not None:
            trace.append(x)
    return x
