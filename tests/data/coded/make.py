#!/usr/bin/env python3
"""Writes the coded checkpoints beside this file: numpy, ml_dtypes and safetensors from PyPI.

Weights are coded and decoded by ml_dtypes' own types; y is the block in float64 with the decoded
weights. Usage: make.py [DIRECTORY]
"""
import json
import os
import sys

import ml_dtypes
import numpy as np
from safetensors import TensorSpec, serialize_file

E, K, T, D = 4, 2, 5, 160
NAMES = {
    np.dtype(ml_dtypes.float8_e4m3fn): "float8_e4m3fn",
    np.dtype(ml_dtypes.float8_e8m0fnu): "float8_e8m0fnu",
    np.dtype(ml_dtypes.bfloat16): "bfloat16",
}
rng = np.random.default_rng(20261201)


def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)


def save(path, tensors):
    kept = {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in tensors.items()}
    serialize_file({name: TensorSpec(dtype=NAMES.get(a.dtype, a.dtype.name), shape=a.shape,
                                     data_ptr=a.ctypes.data, data_len=a.nbytes)
                    for name, a in kept.items()}, path)


def spread(scales, block, shape):
    """Scales of blocks -> one for each weight; the blocks at the edges are short."""
    return np.repeat(np.repeat(scales, block[0], 0), block[1], 1)[: shape[0], : shape[1]]


def fp8(w, block, dtype):
    """Codes, scales, and the decoded weights."""
    grid = (-(-w.shape[0] // block[0]), -(-w.shape[1] // block[1]))
    scales = np.zeros(grid, np.float32)
    for i in range(grid[0]):
        for j in range(grid[1]):
            part = w[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scales[i, j] = np.abs(part).max() / 300
    scales = scales.astype(dtype)
    wide = spread(scales.astype(np.float32), block, w.shape)
    codes = np.clip(w / wide, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return codes, scales, codes.astype(np.float32) * wide


def fp4(w):
    """[..,K] -> bytes [..,K/2], exponents [..,K/32], decoded."""
    groups = w.reshape(*w.shape[:-1], -1, 32)
    scales = (np.abs(groups).max(-1) / 6).astype(ml_dtypes.float8_e8m0fnu)
    wide = scales.astype(np.float32)[..., None]
    codes = np.clip(groups / wide, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    decoded = (codes.astype(np.float32) * wide).reshape(w.shape)
    nibbles = codes.view(np.uint8).reshape(w.shape) & 15
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4, scales, decoded


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def experts(x, weights, ids, glu):
    """The weighted sum of the chosen experts, float64; glu(expert, rows) is one expert."""
    y = np.zeros_like(x)
    for t in range(len(x)):
        for k in range(K):
            y[t] += weights[t, k] * glu(ids[t, k], x[t])
    return y


def choose(scores, by):
    ids = np.argsort(-by, axis=1, kind="stable")[:, :K]
    return ids, np.take_along_axis(scores, ids, 1)


def softmax(logits):
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def finish(root, name, config, tensors, decoded, x, y):
    """decoded: name in the file -> the decoded weights, of which FNV-1a 64 of the bytes is kept."""
    directory = os.path.join(root, name)
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, "config.json"), "w") as f:
        json.dump(config, f, indent=1)
        f.write("\n")
    save(os.path.join(directory, "model.safetensors"), tensors)
    kept = {"x": x.astype(np.float32), "y": y.astype(np.float32)}
    for tensor, values in decoded.items():
        h = 0xCBF29CE484222325
        for byte in values.astype("<f4").tobytes():
            h = (h ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
        kept["fnv." + tensor] = np.array([h], np.uint64).view(np.int64)
    save(os.path.join(directory, "expected.safetensors"), kept)


def numbered(root, name, model, H, code, quantization, more={}):
    """A model with tensors for each expert. code(w) -> ({end: tensor}, decoded)."""
    mixtral_names = model in ("mixtral", "minimax_m2")
    prefix = "model.layers.0.block_sparse_moe." if mixtral_names else "model.layers.0.mlp."
    parts = ("w1", "w3", "w2") if mixtral_names else ("gate_proj", "up_proj", "down_proj")
    tensors, decoded, mlps = {}, {}, []
    shared = model == "deepseek_v3"
    for e in range(E + shared):
        base = prefix + ("experts.%d." % e if e < E else "shared_experts.")
        mlps.append([])
        for part, shape in zip(parts, ((H, D), (H, D), (D, H))):
            coded, values = code(0.2 * normal(*shape))
            for end, tensor in coded.items():
                tensors[base + part + end] = tensor
            first = ".weight_packed" if ".weight_packed" in coded else ".weight"
            decoded[base + part + first] = values
            mlps[-1].append(values.astype(np.float64))
    router = (0.3 * normal(E, D)).astype(ml_dtypes.bfloat16)
    tensors[prefix + "gate.weight"] = router
    x = normal(T, D)
    logits = x.astype(np.float64) @ router.astype(np.float64).T
    config = {"model_type": model, "hidden_size": D, "num_experts_per_tok": K, "hidden_act": "silu",
              "num_hidden_layers": 1, "quantization_config": quantization, **more}
    config["moe_intermediate_size" if not mixtral_names else "intermediate_size"] = H
    if model in ("mixtral", "qwen3_moe"):
        config["num_local_experts" if mixtral_names else "num_experts"] = E
        scores = softmax(logits)
        ids, weights = choose(scores, scores)
        weights = weights / weights.sum(1, keepdims=True)
        if model == "qwen3_moe":
            config["norm_topk_prob"] = True
    else:
        bias = 0.1 * normal(E)
        scores = sigmoid(logits)
        ids, weights = choose(scores, scores + bias.astype(np.float64))
        weights = weights / weights.sum(1, keepdims=True)
        if model == "deepseek_v3":
            tensors[prefix + "gate.e_score_correction_bias"] = bias
            config.update(n_routed_experts=E, n_shared_experts=1, n_group=1, topk_group=1,
                          norm_topk_prob=True, routed_scaling_factor=2.5, scoring_func="sigmoid",
                          topk_method="noaux_tc", first_k_dense_replace=0)
            weights = weights * 2.5
        else:
            tensors[prefix + "e_score_correction_bias"] = bias
            config["num_local_experts"] = E

    def glu(e, v):
        gate, up, down = mlps[e]
        return down @ (silu(gate @ v) * (up @ v))

    v = x.astype(np.float64)
    y = experts(v, weights, ids, glu)
    if shared:
        y += np.stack([glu(E, row) for row in v])
    finish(root, name, config, tensors, decoded, x, y)


def gpt_oss(root):
    H, prefix = 64, "model.layers.0.mlp."
    tensors, decoded = {}, {}

    def stack(name, shape):
        packed, scales, values = fp4(0.2 * normal(*shape))
        tensors[prefix + name + "_blocks"] = packed.reshape(*shape[:2], -1, 16)
        tensors[prefix + name + "_scales"] = scales.view(np.uint8)
        decoded[prefix + name + "_blocks"] = values
        bias = (0.1 * normal(*shape[:2])).astype(ml_dtypes.bfloat16)
        tensors[prefix + name + "_bias"] = bias
        return values.astype(np.float64), bias.astype(np.float64)

    gate_up, gate_up_bias = stack("experts.gate_up_proj", (E, 2 * H, D))
    down, down_bias = stack("experts.down_proj", (E, D, H))
    router = (0.3 * normal(E, D)).astype(ml_dtypes.bfloat16)
    router_bias = (0.1 * normal(E)).astype(ml_dtypes.bfloat16)
    tensors[prefix + "router.weight"], tensors[prefix + "router.bias"] = router, router_bias
    x = normal(T, D)
    v = x.astype(np.float64)
    logits = v @ router.astype(np.float64).T + router_bias.astype(np.float64)
    ids, chosen = choose(logits, logits)

    def glu(e, row):
        both = gate_up[e] @ row + gate_up_bias[e]
        gate, up = np.minimum(both[0::2], 7), np.clip(both[1::2], -7, 7)
        return down[e] @ ((up + 1) * gate * sigmoid(1.702 * gate)) + down_bias[e]

    config = {"model_type": "gpt_oss", "hidden_size": D, "intermediate_size": H,
              "num_local_experts": E, "num_experts_per_tok": K, "hidden_act": "silu",
              "num_hidden_layers": 1, "swiglu_limit": 7.0,
              "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": [
                  "model.layers.*.self_attn", "model.layers.*.mlp.router"]}}
    finish(root, "mxfp4_blocks", config, tensors, decoded, x, experts(v, softmax(chosen), ids, glu))


def blocks(dtype, end=".weight_scale_inv"):
    def code(w):
        codes, scales, values = fp8(w, (128, 128), dtype)
        return {".weight": codes, end: scales}, values
    return code


def channel(w):
    codes, scales, values = fp8(w, (1, w.shape[1]), np.float32)
    return {".weight": codes, ".weight_scale": scales.astype(np.float32)}, values


def whole(w):
    codes, scales, values = fp8(w, w.shape, np.float32)
    return {".weight": codes, ".weight_scale": scales.reshape(()), ".input_scale": np.float32(1).reshape(())}, values


def packed(w):
    codes, scales, values = fp4(w)
    return {".weight_packed": codes, ".weight_scale": scales.view(np.uint8)}, values


def pairs(w):
    codes, scales, values = fp4(w)
    return {".weight": codes.view(np.int8), ".scale": scales}, values


def main(root):
    fp8_config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    ue8m0 = dict(fp8_config, scale_fmt="ue8m0")
    group = {"weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}, "targets": ["Linear"]}
    four = {"weights": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}, "targets": ["Linear"]}
    numbered(root, "fp8_f32", "deepseek_v3", 32, blocks(np.float32), fp8_config)
    numbered(root, "fp8_bf16", "qwen3_moe", 40, blocks(ml_dtypes.bfloat16), fp8_config)
    numbered(root, "fp8_e8m0", "minimax_m2", 32, blocks(ml_dtypes.float8_e8m0fnu), ue8m0)
    numbered(root, "fp8_scale", "minimax_m2", 32, blocks(ml_dtypes.float8_e8m0fnu, ".scale"), ue8m0)
    numbered(root, "fp8_channel", "qwen3_moe", 24, channel,
             {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}, "ignore": ["lm_head"]})
    numbered(root, "fp8_tensor", "mixtral", 32, whole, {"quant_method": "fp8", "activation_scheme": "static"})
    numbered(root, "mxfp4_packed", "minimax_m2", 64, packed,
             {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "config_groups": {"group_0": four}})
    numbered(root, "mxfp4_pairs", "minimax_m2", 64, pairs, ue8m0, {"expert_dtype": "fp4"})
    gpt_oss(root)


main(sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__)))
