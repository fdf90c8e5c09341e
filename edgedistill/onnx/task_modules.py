"""Torch modules with the inputs and outputs that an exported graph shall have. Imported only where a model is exported.

Shapes: B batch, T tokens, S source tokens, P past tokens, D width, H heads.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253


class Outputs(nn.Module):
    """A module whose outputs are named: of a model's own output class those of `names`, else in their order.

    `arguments`: what an input is called in the module's own forward, where that is another name.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...], arguments: dict[str, str] | None = None) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.arguments = arguments or {}

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        found = self.model(**{self.arguments.get(name, name): value for name, value in inputs.items()})
        if isinstance(found, Tensor):
            found = (found,)
        if isinstance(found, dict):
            return {name: found[name] for name in self.names}
        return dict(zip(self.names, found, strict=True))


class Encoder(nn.Module):
    """The encoder of a sequence-to-sequence model, and the keys and values that every decoder layer reads of it.

    They are computed once for a sentence here, where decoding would otherwise compute them for each token.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        from transformers import DynamicCache, EncoderDecoderCache

        model: Any = self.model
        states_BSD = model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        # One token through the decoder fills the cache; the rest of that pass has no output here and is dropped.
        decoder = model.get_decoder()
        decoder(
            input_ids=input_ids[:, :1], encoder_hidden_states=states_BSD, encoder_attention_mask=attention_mask,
            use_cache=True, **{_cache_name(decoder): cache},
        )  # fmt: skip
        found = {"last_hidden_state": states_BSD}
        for index, layer in enumerate(cache.cross_attention_cache.layers):
            found[f"cross_{index}_key"], found[f"cross_{index}_value"] = layer.keys, layer.values
        return found


class Decoder(nn.Module):
    """Decoder and head of a sequence-to-sequence model, a cache in and a longer one out; the cache may be empty.

    Inputs: input_ids [B, T], encoder_attention_mask [B, S], past_i_key/value [B, H, P, D], cross_i_key/value
    [B, H, S, D]. Outputs: logits [B, T, V], present_i_key/value [B, H, P + T, D].
    """

    def __init__(self, model: nn.Module, layers: int) -> None:
        super().__init__()
        self.model = model
        self.layers = layers

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        from transformers import DynamicCache, EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        past, cross = DynamicCache(), DynamicCache()
        for index in range(self.layers):
            past.update(inputs[f"past_{index}_key"], inputs[f"past_{index}_value"], index)
            cross.update(inputs[f"cross_{index}_key"], inputs[f"cross_{index}_value"], index)
        cache = EncoderDecoderCache(past, cross)
        cache.is_updated = dict.fromkeys(range(self.layers), True)
        mask = inputs["encoder_attention_mask"]
        # Only its length is read, for the cross-attention's keys are in the cache.
        model: Any = self.model
        states_BSD = torch.zeros(mask.shape[0], mask.shape[1], model.config.hidden_size)
        encoded: Any = BaseModelOutput(last_hidden_state=states_BSD)
        encoded.router_logits = None  # which mixtures of experts hand on
        found = self.model(
            decoder_input_ids=inputs["input_ids"], encoder_outputs=encoded, attention_mask=mask,
            use_cache=True, **{_cache_name(self.model): cache},
        )  # fmt: skip
        outputs = {"logits": found.logits}
        for index, layer in enumerate(past.layers):
            outputs[f"present_{index}_key"], outputs[f"present_{index}_value"] = layer.keys, layer.values
        return outputs


def _cache_name(module: nn.Module) -> str:
    """What the cache is called: transformers 5.24 gives it a new name, model by model."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"
