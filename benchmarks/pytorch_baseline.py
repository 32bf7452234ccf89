"""The training step of step_time.py in PyTorch, from Hugging Face's classes, in the way in which the original works.

Inside a step: CLIP encodes every candidate frame, a dense agent scores them, G sets of K frames are drawn, and then for
one set after the other: prepare and encode its frames, put the prompt together, generate.
"""

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from benchmarks.step_time import Timer, World
from tspo_jax.checkpoints import weights
from tspo_jax.models.video_prompt import VIDEO_TOKEN

TOWER = "model.vision_tower.vision_tower.vision_model."


class DenseAgent(nn.Module):
    """The temporal agent with a T x T score matrix, of which the window is kept."""

    def __init__(self, width: int, heads: int = 8, window: int = 12):
        super().__init__()
        self.temporal = nn.ModuleDict(
            {name: nn.Linear(width, width) for name in ("Self_q", "Self_k", "Self_v", "ffn_o")}
        )
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.heads, self.window = heads, window

    def forward(self, features, text, temperature):
        """features [T, D], text [D] -> logits [T]."""
        T, D = features.shape
        place = torch.arange(T, device=features.device)
        angle = (place / T)[:, None] * torch.exp(
            torch.arange(0, D, 2, device=features.device) * (-math.log(10000.0) / D)
        )
        y = features + torch.stack([angle.sin(), angle.cos()], -1).reshape(T, D)
        q, k, v = (self.temporal[f"Self_{n}"](y).reshape(T, self.heads, -1).transpose(0, 1) for n in "qkv")
        offset = place - place[:, None]
        seen = (offset >= -(self.window // 2)) & (offset < self.window - self.window // 2)
        scores = (q @ k.transpose(1, 2) / math.sqrt(D // self.heads)).masked_fill(~seen, -1e6)
        z = self.mlp((scores.softmax(-1) @ v).transpose(0, 1).reshape(T, D)) + features
        cosine = nn.functional.cosine_similarity
        return (cosine(z, text[None]) + cosine(features, text[None])) / temperature


class Baseline:
    def __init__(self, world: World, device: str):
        s, self.world, self.device = world.setting, world, device
        self.dtype = getattr(torch, s.dtype)
        tensors = weights.file_tensors(world.params, weights.LLAVA_VIDEO)
        model = world.answerer.config
        language = {k: v for k, v in s.answerer.items() if k in Qwen2Config().to_dict()} | {"model_type": "qwen2"}
        rope = {"rope_type": "default", "rope_theta": s.answerer["rope_theta"]}
        with torch.device(device):
            self.llm = Qwen2ForCausalLM(Qwen2Config(**language, rope_parameters=rope)).to(self.dtype).eval()
            vision = dict(s.answerer.get("vision_config", {})) | {"num_hidden_layers": model.vision.num_hidden_layers}
            vision |= {n: getattr(model.vision, n) for n in ("hidden_size", "intermediate_size", "num_attention_heads")}
            vision |= {n: getattr(model.vision, n) for n in ("image_size", "patch_size")}
            self.tower = SiglipVisionModel(SiglipVisionConfig(**vision, vision_use_head=False)).to(self.dtype).eval()
            self.clip = CLIPModel(CLIPConfig(**copy.deepcopy(s.clip))).to(self.dtype).eval()
            width = model.language.hidden_size
            self.projector = nn.Sequential(
                nn.Linear(model.vision.hidden_size, width), nn.GELU(), nn.Linear(width, width)
            )
            self.projector.to(self.dtype)
            self.agent = DenseAgent(world.text.shape[1])
        fill(self.llm, {n: x for n, x in tensors.items() if n in self.llm.state_dict()})
        has_prefix = any(name.startswith("vision_model.") for name in self.tower.state_dict())
        tower = {n.removeprefix(TOWER): x for n, x in tensors.items() if n.startswith(TOWER)}
        fill(self.tower, {("vision_model." if has_prefix else "") + name: x for name, x in tower.items()})
        projector = "model.mm_projector."
        fill(self.projector, {n.removeprefix(projector): x for n, x in tensors.items() if n.startswith(projector)})
        fill(self.agent, weights.file_tensors(world.agent, weights.Format(weights.AGENT_RENAME)))
        self.newline = as_tensor(tensors["model.image_newline"]).to(device)
        self.optimizer = torch.optim.AdamW(self.agent.parameters(), lr=5e-4, weight_decay=0.0)

    def pixels(self, processor, frames) -> torch.Tensor:
        """Frames as an image tower takes them: resized by Pillow, [n, 3, S, S]."""
        pixels = np.stack([processor.normalize(processor.crop(frame)) for frame in frames])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.device, self.dtype)

    @torch.no_grad()
    def features(self) -> torch.Tensor:
        """CLIP on all T frames as one batch; its numbers are replaced by the shared ones, so that draws are alike."""
        self.clip.get_image_features(pixel_values=self.pixels(self.world.clip_processor, self.world.frames))
        return torch.from_numpy(self.world.features).to(self.device)

    @torch.no_grad()
    def answer(self, picks: np.ndarray, ids: np.ndarray) -> torch.Tensor:
        """Tokens [new] of one frame set."""
        w = self.world
        tokens = self.projector(self.tokens(self.pixels(w.answerer.processor, [w.frames[i] for i in picks])))
        side, width = w.answerer.config.vision.side, tokens.shape[-1]
        grid = tokens.reshape(len(picks), side, side, width).permute(0, 3, 1, 2)
        pooled = w.answerer.config.pooled_side
        grid = nn.functional.interpolate(grid, size=(pooled, pooled), mode="bilinear").permute(0, 2, 3, 1)
        rows = torch.cat([grid, self.newline.expand(len(picks), pooled, 1, width)], dim=2).reshape(-1, width)
        start = int(np.argmax(ids == VIDEO_TOKEN))
        before, after = (torch.from_numpy(part).long().to(self.device) for part in (ids[:start], ids[start + 1 :]))
        embed = self.llm.get_input_embeddings()
        embeddings = torch.cat([embed(before), rows, embed(after)])[None]
        new = {"min_new_tokens": w.answer_tokens, "max_new_tokens": w.answer_tokens, "pad_token_id": 0}
        mask = torch.ones(embeddings.shape[:2], device=self.device)
        return self.llm.generate(inputs_embeds=embeddings, attention_mask=mask, do_sample=False, **new)[0]

    def tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.tower(pixels, output_hidden_states=True).hidden_states[-1]

    def step(self, step: int, timer: Timer) -> None:
        s = self.world.setting
        text = torch.from_numpy(self.world.text).to(self.device)
        losses = []
        for b in range(s.B):
            features = timer("CLIP", lambda: wait(self.features()))[b]
            logits = timer("sample", lambda: wait(self.agent(features, text[b], 0.025)))  # noqa: B023
            noise = -torch.log(-torch.log(torch.rand(s.G, s.T, device=self.device)))
            picks = (logits.detach() + noise).topk(s.K).indices.sort().values
            rewards = []
            for chosen in picks.cpu().numpy():
                ids = self.world.prompt_ids[b]
                tokens = timer("answer", lambda: wait(self.answer(chosen, ids)))  # noqa: B023
                rewards.append(float(tokens[0] % 7) / 7)
            reward = torch.tensor(rewards, device=self.device)
            advantage = (reward - reward.mean()) / (reward.std() + 1e-4)
            chosen = logits.log_softmax(-1)[picks]
            losses.append(-((chosen - chosen.detach()).exp().mean(-1) * advantage).mean())
        timer("update", lambda: wait(self.update(torch.stack(losses).mean())))

    def update(self, loss: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.agent.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()

    def pieces(self, images: int, prompts: int) -> dict[str, Callable]:
        """The same as those of `Ours`."""
        s, model = self.world.setting, self.world.answerer.config
        N = s.prompt_tokens - 1 + model.num_visual_tokens(s.K)
        options = {"device": self.device, "dtype": self.dtype}
        pixels = torch.randn(images, 3, *[model.vision.image_size] * 2, **options)
        hidden = torch.randn(prompts, N, model.language.hidden_size, **options)

        @torch.no_grad()
        def encode():
            return self.tokens(pixels)

        @torch.no_grad()
        def prefill():
            return self.llm(inputs_embeds=hidden, use_cache=True, logits_to_keep=1)

        cache = prefill().past_key_values

        @torch.no_grad()
        def decode():
            logits = self.llm(inputs_embeds=hidden[:, :1], past_key_values=cache, use_cache=True).logits
            cache.crop(-1)
            return logits

        return {
            "SigLIP": lambda: wait(encode()),
            "prefill": lambda: wait(prefill().logits),
            "decode": lambda: wait(decode()),
        }


def fill(module: nn.Module, tensors: dict[str, np.ndarray]) -> None:
    """Every parameter of a module, by name."""
    with torch.no_grad():
        parameters = dict(module.named_parameters())
        missing = [name for name in parameters if name not in tensors]
        assert not missing, f"no weights for {missing}"
        for name, parameter in parameters.items():
            parameter.copy_(as_tensor(tensors[name]))


def as_tensor(x: np.ndarray) -> torch.Tensor:
    """Of the same dtype; PyTorch does not know NumPy's bfloat16."""
    return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if x.dtype == "bfloat16" else torch.from_numpy(x)


def wait(x: torch.Tensor) -> torch.Tensor:
    if x.is_cuda:
        torch.cuda.synchronize()
    return x
