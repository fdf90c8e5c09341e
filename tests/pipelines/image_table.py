"""A tiny image processor of each class of transformers, each with settings of its own, and a model that takes its size.

Sizes that are no square, crops, other means, no rescaling, shifted ranges, padding, the order of channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.family_table import model_of

ODD = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}
SWIN: dict[str, Any] = {"patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
VIT: dict[str, Any] = {"image_size": 16, "patch_size": 4}


@dataclass(frozen=True)
class Image:
    """A processor's settings, and the family of a model with what its configuration says."""

    settings: dict[str, Any]
    family: str
    changes: dict[str, Any] = field(default_factory=dict)
    task: str = "image-classification"
    refused: tuple[str, ...] = ()


def _square(size: int) -> dict[str, int]:
    return {"height": size, "width": size}


# class → its settings and its model
IMAGES: dict[str, Image] = {
    "ViTImageProcessor": Image(
        {"size": {"height": 16, "width": 24}, "resample": 3, **ODD}, "vit", {"image_size": [16, 24], "patch_size": 4}
    ),
    "DeiTImageProcessor": Image({"size": _square(20), "crop_size": _square(16), **ODD}, "deit",
        {**VIT, "architectures": ["DeiTForImageClassification"]},
    ),
    "BeitImageProcessor": Image(
        {"size": _square(16), "do_center_crop": False, "do_rescale": False, "image_mean": [127.5] * 3,
         "image_std": [100.0] * 3},
        "beit", {**VIT, "out_indices": None},
    ),
    "ConvNextImageProcessor": Image(
        {"size": {"shortest_edge": 32}, "crop_pct": 0.8}, "convnext",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    ),
    "CLIPImageProcessor": Image(
        {"size": {"shortest_edge": 18}, "crop_size": _square(16), "do_convert_rgb": False}, "clip",
        {"vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                           "num_attention_heads": 2, **VIT}},
    ),
    "SiglipImageProcessor": Image(
        {"size": _square(16), "resample": 2, "do_normalize": False}, "siglip",
        {"vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                           "num_attention_heads": 2, **VIT}},
    ),
    "MobileNetV1ImageProcessor": Image(
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 36}}, "mobilenet_v1",
        {"depth_multiplier": 0.25, "min_depth": 4},
    ),
    "MobileNetV2ImageProcessor": Image(
        {"size": {"shortest_edge": 36}, "crop_size": _square(32), "resample": 0}, "mobilenet_v2",
        {"depth_multiplier": 0.25, "min_depth": 4},
    ),
    "MobileViTImageProcessor": Image(
        {"size": {"shortest_edge": 36}, "crop_size": _square(32), "do_flip_channel_order": True}, "mobilevit",
        {"hidden_sizes": [16, 20, 24], "neck_hidden_sizes": [4, 8, 8, 12, 12, 16, 32], "image_size": 32},
    ),
    "EfficientNetImageProcessor": Image(
        {"size": _square(32), "rescale_offset": True, "rescale_factor": 1 / 127.5, "include_top": False},
        "efficientnet",
        {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320, "num_block_repeats": [1] * 7},
    ),
    "LevitImageProcessor": Image(
        {"size": {"shortest_edge": 30}, "crop_size": _square(32)}, "levit",
        {"image_size": 32, "hidden_sizes": [16, 24, 32], "num_attention_heads": [1, 2, 2], "depths": [1, 1, 1],
         "key_dim": [8, 8, 8], "architectures": ["LevitForImageClassification"]},
    ),
    "PvtImageProcessor": Image(
        {"size": _square(32), **ODD}, "pvt",
        {"image_size": 32, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2],
         "num_encoder_blocks": 4},
    ),
    "BitImageProcessor": Image(
        {"size": {"shortest_edge": 20}, "crop_size": _square(16), "do_convert_rgb": True, **ODD}, "dinov2", VIT
    ),
    "PoolFormerImageProcessor": Image(
        {"size": {"shortest_edge": 32}, "crop_pct": 0.9, "crop_size": _square(32)}, "poolformer",
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    ),
    "SegformerImageProcessor": Image(
        {"size": {"height": 32, "width": 48}, "do_reduce_labels": True}, "segformer",
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]},
    ),
    "TextNetImageProcessor": Image(
        {"size": {"shortest_edge": 40}, "size_divisor": 16}, "textnet",
        {"hidden_sizes": [8, 8, 8, 8, 8], "conv_layer_kernel_sizes": [[[3, 3]], [[3, 1]], [[1, 3]], [[3, 3]]],
         "conv_layer_strides": [[2], [2], [2], [2]], "stem_num_channels": 3, "stem_out_channels": 8},
    ),
    "PerceiverImageProcessor": Image(
        {"size": _square(16), "crop_size": _square(20)}, "perceiver",
        {"num_latents": 8, "d_latents": 16, "num_blocks": 1, "num_self_attends_per_block": 1,
         "num_self_attention_heads": 2, "num_cross_attention_heads": 1, "image_size": 16,
         "architectures": ["PerceiverForImageClassificationLearned"]},
        refused=("takes inputs",),
    ),
    "DonutImageProcessor": Image(
        {"size": {"height": 24, "width": 32}, "do_align_long_axis": True, "do_thumbnail": True, "do_pad": True},
        "donut-swin",
        {"image_size": [24, 32], **SWIN},
    ),
    "BlipImageProcessor": Image(
        {"size": {"height": 24, "width": 16}}, "vit", {"image_size": [24, 16], "patch_size": 8}
    ),
    "DPTImageProcessor": Image(
        {"size": _square(30), "ensure_multiple_of": 16, "keep_aspect_ratio": False}, "swinv2",
        {"image_size": 32, **SWIN},
    ),
    "ChineseCLIPImageProcessor": Image(
        {"size": {"shortest_edge": 20}, "crop_size": _square(16)}, "swin",
        {"image_size": 16, **SWIN},
    ),
    "FlavaImageProcessor": Image({"size": _square(18), "crop_size": _square(16)}, "vit_msn", VIT),
    # What a graph of pixels alone does not take
    "ViltImageProcessor": Image(
        {"size": {"shortest_edge": 32}, "size_divisor": 16}, "resnet",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    ),
    "Siglip2ImageProcessor": Image(
        {"patch_size": 4, "max_num_patches": 16}, "siglip2",
        {"vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                           "patch_size": 4, "num_patches": 16}},
        refused=("pixel_attention_mask",),
    ),
    "ImageGPTImageProcessor": Image(
        {"size": _square(6), "clusters": [[i / 8 - 1, i / 9 - 1, i / 7 - 1] for i in range(16)]}, "imagegpt",
        {"vocab_size": 17, "n_positions": 36},
        refused=("takes input_ids",),
    ),
}  # fmt: skip


def image_checkpoint(folder: Path, processor: str) -> None:
    """A model with a processor of the class."""
    import transformers

    row = IMAGES[processor]
    kind: Callable[..., Any] = getattr(transformers, f"{processor}Pil")
    kind(**row.settings).save_pretrained(folder)
    model_of(row.family, row.task, num_labels=3, **row.changes).save_pretrained(folder)
