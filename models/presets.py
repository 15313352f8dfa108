"""The dimensions of known models, from their `config.json`, for planning and benchmarks; a run reads its own model's file."""

from functools import partial

from models.gemma import GemmaConfig


def local(layers: int, pattern: int) -> tuple[bool, ...]:
    """Which layers are local when every `pattern`-th one is global."""
    return tuple((i + 1) % pattern != 0 for i in range(layers))


# fmt: off
gemma2 = partial(GemmaConfig, sliding_window=4096, attn_softcap=50.0, final_softcap=30.0, post_norms=True)
gemma3 = partial(GemmaConfig, sliding_window=512, rope_base=1e6, post_norms=True, qk_norms=True)
gemma3_large = partial(gemma3, sliding_window=1024, rope_factor=8.0)
gemma4 = partial(
    gemma3, norm_offset=0.0, global_head_dim=512, rope_fraction=0.25, final_softcap=30.0, per_layer_dim=256,
)
gemma4_large = partial(gemma4, sliding_window=1024, global_kv_heads=1, values_are_keys=True, per_layer_dim=0)

#                             L      D  N  K    H       F        V  query scale  local layers
MODELS: dict[str, GemmaConfig] = {
    "gemma-2b":    GemmaConfig(18, 2048, 8, 1, 256, 16_384, 256_000, 256**-0.5, (False,) * 18),
    "gemma2-2b":        gemma2(26, 2304, 8, 4, 256,  9_216, 256_000, 256**-0.5, local(26, 2)),
    "gemma3-1b":        gemma3(26, 1152, 4, 1, 256,  6_912, 262_144, 256**-0.5, local(26, 6)),
    "gemma3-270m":      gemma3(18,  640, 4, 1, 256,  2_048, 262_144, 256**-0.5, local(18, 6)),
    "gemma3-4b":  gemma3_large(34, 2560, 8, 4, 256, 10_240, 262_208, 256**-0.5, local(34, 6)),
    "gemma4-e2b":       gemma4(35, 1536, 8, 1, 256,  6_144, 262_144, 1.0, local(35, 5), shared_layers=20, shared_mlp_dim=12288),
    "gemma4-e4b":       gemma4(42, 2560, 8, 2, 256, 10_240, 262_144, 1.0, local(42, 6), shared_layers=18),
    "gemma4-12b": gemma4_large(48, 3840, 16, 8, 256, 15_360, 262_144, 1.0, local(48, 6)),
    "gemma2-6m":        gemma2( 4,  256, 4, 2,  64,  1_024,   8_192,  64**-0.5, local(4, 2)),  # for any machine
}
# The embedded model, whose config.json is read without transformers.
TINY = gemma3(3, 128, 4, 1, 32, 384, 616, 32**-0.5, (True, False, True), sliding_window=64, rope_base=1e4)
