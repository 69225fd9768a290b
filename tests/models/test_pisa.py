"""PISA in tiny, random transformers and pipelines of diffusers."""

import copy
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

from flash_bla import piecewise_sparse_attention
from flash_bla.models.pisa import reset_processor, set_processor


def flux():
    """A transformer with a double and a single block, and inputs: 10 tokens of text and 96 of an image."""
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    positions = torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(12.0))
    inputs = dict(
        hidden_states=torch.randn(1, 96, 4),
        encoder_hidden_states=torch.randn(1, 10, 32),
        pooled_projections=torch.randn(1, 32),
        timestep=torch.tensor([0.5]),
        img_ids=positions,
        txt_ids=torch.zeros(10, 3),
    )
    return model, inputs


def wan():
    """A transformer of two blocks for 128 tokens of a video; the text has as many, which must not confuse them."""
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    inputs = dict(
        hidden_states=torch.randn(1, 4, 2, 16, 16),
        timestep=torch.tensor([3]),
        encoder_hidden_states=torch.randn(1, 128, 16),
    )
    return model, inputs


@pytest.fixture(params=[flux, wan], ids=["flux", "wan"])
def case(request):
    torch.manual_seed(0)
    model, inputs = request.param()
    with torch.no_grad():
        yield model.eval(), inputs


def run(model, inputs):
    return model(**inputs, return_dict=False)[0]


def test_density_one_is_the_original_and_undone_is_bit_for_bit(case):
    model, inputs = case
    processors, expected = dict(model.attn_processors), run(model, inputs)
    assert set_processor(model, density=1.0, block_size=16) is model
    torch.testing.assert_close(run(model, inputs), expected, rtol=0, atol=1e-4)

    set_processor(model, density=0.25, block_size=16)  # once more, over the first
    sparse = run(model, inputs)
    assert sparse.isfinite().all() and 1e-4 < (sparse - expected).abs().max() < 0.5
    assert model.state_dict().keys() == copy.deepcopy(model).state_dict().keys()

    assert reset_processor(model) is model
    assert all(model.attn_processors[name] is processor for name, processor in processors.items())
    assert torch.equal(run(model, inputs), expected)
    reset_processor(model)  # nothing to undo


def test_self_attention_of_all_blocks_and_nothing_else(case, monkeypatch):
    model, inputs = case
    calls = []

    def record(q, k, v, *options):
        calls.append((tuple(q.shape), *options))
        return piecewise_sparse_attention(q, k, v, *options)

    monkeypatch.setattr("flash_bla.models.pisa.piecewise_sparse_attention", record)
    before = dict(model.attn_processors)
    set_processor(model, density=0.5, block_size=16, use_bias=True)
    after = model.attn_processors
    assert all((after[name] is before[name]) == (".attn2." in name) for name in before)
    assert all(isinstance(after[name], type(before[name])) for name in before)
    run(model, inputs)
    # text and image as one sequence in Flux; in Wan the video alone
    shape = (1, 2, 10 + 96, 16) if isinstance(model, FluxTransformer2DModel) else (1, 2, 2 * 8 * 8, 12)
    assert calls == [(shape, 0.5, 16, None, True)] * 2


def test_compiled_without_graph_breaks(case):
    model, inputs = case
    expected = run(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    set_processor(compiled, density=0.25, block_size=16)
    sparse = run(model, inputs)
    torch.testing.assert_close(run(compiled, inputs), sparse)
    reset_processor(compiled)
    torch.testing.assert_close(run(compiled, inputs), expected)


def test_a_part_of_a_transformer():
    model, _ = flux()
    set_processor(model.single_transformer_blocks, density=0.5)
    replaced = [hasattr(processor, "exact_processor") for processor in model.attn_processors.values()]
    assert replaced == [False, True]
    reset_processor(model)


@torch.no_grad()
def test_processors_with_weights_and_a_cross_attention_of_their_own():
    """The image prompt's few tokens are attended to as before."""
    torch.manual_seed(0)
    model, inputs = flux()
    processor = FluxIPAdapterAttnProcessor(32, 32)
    attention = model.transformer_blocks[0].attn
    attention.set_processor(processor)
    names = model.state_dict().keys()
    tokens = [torch.randn(1, 4, 32)]
    call = dict(
        hidden_states=torch.randn(1, 96, 32), encoder_hidden_states=torch.randn(1, 10, 32), ip_hidden_states=tokens
    )
    expected = attention(**call)
    for density in (1.0, 0.25):
        set_processor(model, density, block_size=16)
        sparse = attention(**call)
        assert model.state_dict().keys() == names
    assert not torch.equal(sparse[0], expected[0]) and torch.equal(sparse[2], expected[2])
    reset_processor(model)
    assert attention.processor is processor
    assert all(torch.equal(a, b) for a, b in zip(attention(**call), expected, strict=True))


@torch.no_grad()
def test_a_mask_leaves_the_attention_exact():
    torch.manual_seed(0)
    model, _ = wan()
    attention = model.blocks[0].attn1
    tokens, mask = torch.randn(1, 64, 24), torch.ones(64, 64, dtype=torch.bool).tril()
    expected = attention(tokens, None, mask)
    set_processor(model, density=0.1, block_size=16)
    assert torch.equal(attention(tokens, None, mask), expected)


@torch.no_grad()
def test_a_pipeline_of_flux():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )
    pipeline = FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, flux()[0])
    pipeline.set_progress_bar_config(disable=True)

    def generate():
        return pipeline(
            prompt_embeds=torch.ones(1, 10, 32), pooled_prompt_embeds=torch.ones(1, 32), height=24, width=24,
            num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt",
        ).images  # fmt: skip

    expected = generate()
    assert set_processor(pipeline, density=0.25, block_size=16) is pipeline
    assert generate().isfinite().all() and not torch.equal(generate(), expected)
    reset_processor(pipeline)
    assert torch.equal(generate(), expected)


def test_all_transformers_of_a_pipeline():
    class Pipeline:
        def __init__(self, **components):
            self.components = components

    pipeline = Pipeline(transformer=wan()[0], transformer_2=wan()[0], vae=nn.Linear(1, 1), transformer_3=None)
    set_processor(pipeline)
    for name in ("transformer", "transformer_2"):
        assert hasattr(pipeline.components[name].blocks[1].attn1.processor, "exact_processor")
    with pytest.raises(ValueError, match="a transformer, or a pipeline that has one, got Pipeline of unet, vae"):
        set_processor(Pipeline(unet=None, vae=None))


def test_errors():
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=2,
        cross_attention_dim=8,
        norm_num_groups=4,
    )
    with pytest.raises(ValueError, match="UNet2DConditionModel has no self-attention whose processor calls dispatch"):
        set_processor(unet)
    with pytest.raises(ValueError, match="must be a transformer, or a pipeline that has one, got str$"):
        set_processor("black-forest-labs/FLUX.1-dev")
    model, _ = wan()
    for density in (0, 1.5):
        with pytest.raises(ValueError, match=r"density must be a number in \(0, 1\]"):
            set_processor(model, density)
    with pytest.raises(ValueError, match="block_size must be a positive integer"):
        set_processor(model, block_size=0)
    assert not any(hasattr(processor, "exact_processor") for processor in model.attn_processors.values())


def test_without_diffusers(monkeypatch):
    model, _ = wan()
    monkeypatch.setitem(sys.modules, "diffusers.models.attention_dispatch", None)
    with pytest.raises(ImportError, match=r"needs diffusers .* pip install flash-bla\[diffusion\]"):
        set_processor(model)
