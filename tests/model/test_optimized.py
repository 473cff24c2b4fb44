"""What an optimized program says, read from programs of a few lines."""

# ruff: noqa: E501 - programs as XLA writes them
import pytest

from runner.model.optimized import read_program

# As XLA writes them for a GPU: two weights joined, a float16 and an integer library call, a kernel.
GPU = """HloModule jit_forward, is_scheduled=true

%fused_concatenate (param_0: f16[2048,256], param_1: f16[2048,256]) -> f16[2048,512] {
  %param_0 = f16[2048,256]{1,0} parameter(0)
  %param_1 = f16[2048,256]{1,0} parameter(1)
  ROOT %concatenate.1 = f16[2048,512]{1,0} concatenate(%param_0, %param_1), dimensions={1}
}

%gemm_fusion_dot (parameter_0: f16[64,512], parameter_1: f16[512,64]) -> f32[64,64] {
  %parameter_0 = f16[64,512]{1,0} parameter(0)
  %parameter_1 = f16[512,64]{1,0} parameter(1)
  ROOT %dot.5 = f32[64,64]{1,0} dot(%parameter_0, %parameter_1), lhs_contracting_dims={1}
}

ENTRY %main.9 (trainable_0_.1: f16[2048,256], trainable_1_.1: f16[2048,256]) -> f16[64,512] {
  %entry.1 = s32[64,8]{1,0} parameter(4), metadata={op_name="entry"}
  %trainable_0_.1 = f16[2048,256]{1,0} parameter(0), sharding={replicated}
  %trainable_1_.1 = f16[2048,256]{1,0} parameter(1)
  %bitcast.1 = f16[2048,256]{1,0} bitcast(%trainable_1_.1)
  %non_trainable_0_.1 = s8[512,64]{1,0} parameter(2)
  %joined = f16[2048,512]{1,0} fusion(%trainable_0_.1, %bitcast.1), kind=kInput, calls=%fused_concatenate
  %hidden = f16[64,2048]{1,0} fusion(%entry.1), kind=kLoop, calls=%fused_gather
  %quantized = s8[64,512]{1,0} fusion(%hidden), kind=kLoop, calls=%fused_round
  %custom-call.1 = (f16[64,512]{1,0}, s8[4194304]{0}) custom-call(%hidden, %joined), custom_call_target="__cublas$lt$matmul"
  %custom-call.2 = (s32[64,64]{1,0}, s8[64]{0}) custom-call(%quantized, %non_trainable_0_.1), custom_call_target="__cublas$lt$matmul"
  %scores = f32[4,2,512,512]{3,2,1,0} fusion(%hidden), kind=kLoop, calls=%fused_scores
  ROOT %gemm = f32[64,64]{1,0} fusion(%hidden, %joined), kind=kCustom, calls=%gemm_fusion_dot, backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}
}
"""


def test_products_are_counted_by_what_computes_them():
    assert read_program(GPU, length=512)["products"] == {
        "library call of f16": 1,
        "library call of s8": 1,
        "fused kernel of f16": 1,
    }


def test_a_product_inside_a_kernels_parts_is_the_kernels():
    """As XLA writes those for an H100."""
    text = """%part (p: bf16[8,8]) -> bf16[8,8] {
  %p = bf16[8,8]{1,0} parameter(0)
  ROOT %dot.1 = bf16[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%kernel (a: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  ROOT %nested = bf16[8,8]{1,0} fusion(%a), kind=kCustom, calls=%part
}

ENTRY %main (x: bf16[8,8]) -> bf16[8,8] {
  %x = bf16[8,8]{1,0} parameter(0)
  ROOT %f = bf16[8,8]{1,0} fusion(%x), kind=kCustom, calls=%kernel, \
backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"}}
}
"""
    assert read_program(text, length=8)["products"] == {"fused kernel of bf16": 1}


def test_a_square_of_scores_is_found_at_its_length_alone():
    assert read_program(GPU, length=512)["squares"] == 1
    assert read_program(GPU, length=384)["squares"] == 0
    assert read_program(GPU.replace("f32[4,2,512", "f16[4,2,512"), length=512)["squares"] == 0
    assert "512 x 512" in read_program(GPU, length=512)["warnings"][0]
    # As many as 4 rows and 2 heads have; with 4 heads, it is a chunk of grouped queries.
    assert read_program(GPU, length=512, scores=4 * 2 * 512**2)["squares"] == 1
    assert read_program(GPU, length=512, scores=4 * 4 * 512**2)["squares"] == 0


def test_what_is_made_of_weights_alone_is_found():
    found = read_program(GPU, length=384)
    assert found["made_of_weights_bytes"] == 2048 * 512 * 2
    assert [text for text in found["warnings"] if "computed from weights alone" in text]
    # The batch has a part in it.
    other = GPU.replace("fusion(%trainable_0_.1, %bitcast.1)", "fusion(%hidden, %bitcast.1)")
    assert read_program(other, length=384)["made_of_weights_bytes"] == 0
    # It is small.
    other = GPU.replace("%joined = f16[2048,512]", "%joined = f16[20,512]")
    assert read_program(other, length=384)["made_of_weights_bytes"] == 0


@pytest.mark.parametrize("dtype", ["s8", "s4"])
def test_an_integer_product_that_is_no_library_call(dtype):
    text = GPU.replace("%parameter_0 = f16", f"%parameter_0 = {dtype}").replace(
        '"kind":"__triton_gemm"', '"kind":"none"'
    )
    found = read_program(text, length=64)
    assert found["products"][f"loop of {dtype}"] == 1
    assert "1 integer products are not library calls" in found["warnings"]


def test_a_tpus_products_are_convolutions():
    text = """ENTRY %main (a: bf16[8,8]) -> f32[8,8] {
  %a = bf16[8,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %convolution.1 = f32[8,8]{1,0} convolution(%a, %a), dim_labels=bf_io->bf
}
"""
    assert read_program(text, length=8)["products"] == {"matrix unit of bf16": 1}


def test_a_text_that_is_no_program_has_nothing():
    assert read_program("", length=8) == {
        "products": {}, "squares": 0, "made_of_weights_bytes": 0, "warnings": [],
    }  # fmt: skip
