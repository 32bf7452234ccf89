import pytest

from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.folders import load_answerer, load_clip
from tspo_jax.checkpoints.plain_folders import CheckpointError


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            {"config.json": '{"quantization_config": {"quant_method": "fp8"}}'},
            r"config.json: quantization_config \(fp8\)",
        ),
        ({"config.json": '{"text_config": {"quantization_config": {"quant_method": "awq"}}}'}, r"\(awq\): quantised"),
        (
            {"adapter_config.json": '{"base_model_name_or_path": "Qwen/X"}'},
            "is a PEFT adapter of Qwen/X; .* --adapter=",
        ),
        ({"model-q4.gguf": ""}, r"holds model-q4.gguf \(GGUF, quantised\)"),
        ({"onnx/model.onnx": ""}, r"holds model.onnx \(ONNX\)"),
        ({"pytorch_model-00001-of-00002.bin": "", "config.json": "{}"}, "holds only PyTorch files .*save_pretrained"),
        ({"optimizer.pt": "", "trainer_state.json": "{}"}, r"holds a trainer's state \(optimizer.pt\)"),
        ({"global_step5/x": "", "zero_to_fp32.py": ""}, r"holds a trainer's state \(global_step5\)"),
        ({"snapshots/1a2b/config.json": "{}"}, r"is a folder of Hugging Face's cache; give what is in it, .*/1a2b"),
        ({"model.safetensors": "version https://git-lfs.github.com/spec/v1\n"}, "is Git LFS's pointer to a file"),
        ({"pytorch_model_fsdp_0/__0_0.distcp": ""}, r"holds a trainer's state \(__0_0.distcp\)"),
        ({"mp_rank_00_model_states.pt": ""}, r"holds a trainer's state \(mp_rank_00_model_states.pt\)"),
        ({"openvino_model.xml": "", "openvino_model.bin": ""}, r"holds openvino_model.xml \(OpenVINO\)"),
        ({"adapter_config.json": "{}", "config.json": "{}", "adapter_model.safetensors": ""}, "is a PEFT adapter of"),
        ({"config.json": '{"quantization": {"bits": 4}}', "model.safetensors": ""}, r"config.json: quantization \(unk"),
        ({"quantize_config.json": "{}", "model.safetensors": ""}, r"quantize_config.json \(gptq\): quantised"),
        ({"config.json": '{"seed": 0}', "checkpoints/5/x": ""}, "is a run folder"),
    ],
)
def test_folders_that_are_no_plain_model_are_told_in_one_line(tmp_path, make, message):
    for name, text in make.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for read in (weights.SafetensorsFolder, weights.read_config, load_answerer, load_clip):
        with pytest.raises(CheckpointError, match=message) as error:
            read(tmp_path)
        assert "\n" not in str(error.value)
