"""Networks whose weights the user brings, with made-up weights of the right names and shapes: from the option to the row."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from quantdit.evaluation.networks.clip import CLIP_DEVIATION, CLIP_MEAN, load_clip
from quantdit.evaluation.networks.inception import Inception, load_inception, with_weights
from quantdit.evaluation.samples import Sampling, sample
from quantdit.pipelines.pipeline import load_pipeline

SAMPLES, STEPS = 4, 2


def random_state(seed: int = 0) -> dict[str, Tensor]:
    """Return weights of the FID's Inception that keep the size of what goes through it."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in Inception().state_dict().items():
        if name.endswith("num_batches_tracked"):
            found[name] = tensor
        elif tensor.ndim > 1:
            found[name] = torch.randn(tensor.shape, generator=draw) * (2 / tensor[0].numel()) ** 0.5
        else:
            near = 0.1 * torch.randn(tensor.shape, generator=draw)
            found[name] = near if name.endswith(("bias", "running_mean")) else 1 + near.abs()
    return found


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_state()


@pytest.fixture(scope="module")
def inception_file(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model of 16 pixels, and a tokenizer that knows letters."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip") / "tiny"
    letters = [chr(c) for c in range(33, 127)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[])
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 24}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    text = sizes | ends | {"vocab_size": len(words), "max_position_embeddings": 12}
    torch.manual_seed(2)
    config = transformers.CLIPConfig(
        text_config=text, vision_config=sizes | {"image_size": 16, "patch_size": 4}, projection_dim=24
    )
    model = transformers.CLIPModel(config)
    for tensor in model.parameters():  # as initialised, all pictures look alike to it
        tensor.data += 0.1 * torch.randn(tensor.shape)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of 16 x 16 pixels, and one whose weights are a little off."""
    from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

    from quantdit.models.pixel_dit import PixelDiTPipeline

    folder = tmp_path_factory.mktemp("models")
    sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 1, "out_channels": 1, "num_layers": 1}
    torch.manual_seed(3)
    model = DiTTransformer2DModel(**sizes, sample_size=16, patch_size=4, num_embeds_ada_norm=3)
    for name in ("full", "off"):
        PixelDiTPipeline(model, FlowMatchEulerDiscreteScheduler()).save_pretrained(folder / name)
        for tensor in model.parameters():
            tensor.data += 0.02 * torch.randn(tensor.shape)
    return folder / "full", folder / "off"


def test_inception_is_torch_fidelity_s(inception_file: Path):
    """Figures of torch-fidelity 0.4.0's FeatureExtractorInceptionV3, "2048", with the same file and pictures."""
    pixels = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    backbone = load_inception(inception_file)
    found = backbone.features(pixels.float() / 127.5 - 1)
    assert found.shape == (2, 2048) and backbone.frechet == "FID" and backbone.name == "InceptionV3-FID"
    first = [0.9174550771713257, 0.3447107672691345, 0.0, 3.2565791606903076]
    last = [0.004913599230349064, 0.0, 0.0, 2.843719244003296]
    assert found[0, 2044:].tolist() == pytest.approx(first, rel=1e-4, abs=1e-5)
    assert found[1, :4].tolist() == pytest.approx(last, rel=1e-4, abs=1e-5)
    assert found.norm(dim=1).tolist() == pytest.approx([59.507991790771484, 59.58284378051758], rel=1e-5)


def generated(folder: Path, cache: Path, seed: int = 0) -> Tensor:
    pipeline, source = load_pipeline(str(folder))
    return sample(pipeline, source, Sampling(SAMPLES, seed, STEPS), cache).images


def test_weights_given_end_as_rows(models: tuple[Path, Path], inception_file: Path, clip_folder: Path, tmp_path: Path, cli):
    """FID, CLIP score and CMMD of the report are what plain formulas make of the two models' pictures."""
    ask = ("evaluate", *models, "--samples", SAMPLES, "--steps", STEPS, "--probes", 2, "--output", tmp_path)
    ran = cli(*ask, "--inception-weights", inception_file, "--clip-weights", clip_folder)
    assert ran.code == 0, ran.err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["identity"]["backbone"] == "InceptionV3-FID" and {"FID", "KID", "CMMD (CLIP-tiny)"} <= report["sets"].keys()
    for text in (ran.out, (tmp_path / "report.html").read_text()):
        assert "FID" in text and "EffNet" not in text and "CLIP score" in text and "CMMD (CLIP-tiny)" in text

    pictures = [generated(folder, tmp_path / "samples") for folder in models]
    network = load_inception(inception_file)
    a, b = (network.features(x).double().numpy() for x in pictures)
    da, db = ((x - x.mean(0)) / (SAMPLES - 1) ** 0.5 for x in (a, b))
    roots = np.sqrt(np.maximum(np.linalg.eigvals(da @ db.T @ db @ da.T).real, 0)).sum()
    fid = ((a.mean(0) - b.mean(0)) ** 2).sum() + (da**2).sum() + (db**2).sum() - 2 * roots
    assert report["sets"]["FID"]["drift"] == pytest.approx(fid, rel=1e-4) and fid > 1e-3
    assert report["drift"]["FID"]["drift"] == report["sets"]["FID"]["drift"]

    import transformers

    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(clip_folder)(
        [row["prompt"] for row in report["samples"]], padding=True, return_tensors="pt"
    )
    embedded = []
    for side, x in zip(("reference", "candidate"), pictures, strict=True):
        mean, deviation = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_DEVIATION))
        with torch.inference_mode():
            found = model(**tokens, pixel_values=((x + 1) / 2 - mean) / deviation)
        expected = 100 * (found.image_embeds * found.text_embeds).sum(1).clamp_min(0)
        assert [row[f"clip_score_{side}"] for row in report["samples"]] == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-3)
        embedded.append(found.image_embeds.double().numpy())
    kernel = [np.exp(-((x[:, None] - y) ** 2).sum(-1) / 200).mean() for x in embedded for y in embedded]
    cmmd = 1000 * (kernel[0] + kernel[3] - kernel[1] - kernel[2])
    assert report["sets"]["CMMD (CLIP-tiny)"]["drift"] == pytest.approx(cmmd, rel=1e-2, abs=1e-5)


def test_pictures_are_prepared_as_clip_s_own_processor_does(clip_folder: Path):
    """Cropped to the middle square for the score; pressed into a square, which CMMD does, they are others."""
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    coarse = torch.rand(3, 3, 5, 9, generator=torch.Generator().manual_seed(4))
    pixels = (torch.nn.functional.interpolate(coarse, (30, 53), mode="bilinear") * 255).byte()
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    with torch.inference_mode():
        inner = model.vision_model(**processor(pictures, return_tensors="pt")).pooler_output
        expected = model.visual_projection(inner)
    clip = load_clip(clip_folder)
    cropped, pressed = (clip.images(pixels.float() / 127.5 - 1, crop) for crop in (True, False))
    errors = [((x - expected).norm() / expected.norm()).item() for x in (cropped, pressed)]
    assert errors[0] < 0.01 and errors[1] > 0.1  # half a step of 8-bit pixels, by which PIL rounds in between


def test_long_prompts_are_cut_to_what_clip_takes(clip_folder: Path):
    assert load_clip(clip_folder).texts(["an owl " * 20, "a"]).shape == (2, 24)


class Hostile:
    """What a pickle of anything else than tensors may be."""

    def __reduce__(self) -> tuple[Callable, tuple]:
        return print, ("unpickled",)


def missing(state: dict[str, Tensor]) -> object:
    return {k: v for k, v in state.items() if k != "Mixed_7c.branch_pool.bn.running_var"}


def misshapen(state: dict[str, Tensor]) -> object:
    return state | {"fc.weight": torch.zeros(1000, 2048)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (missing, "no tensor Mixed_7c.branch_pool.bn.running_var, of 472 expected"),
        (misshapen, r"fc.weight is float32 \[1000, 2048\], expected float32 \[1008, 2048\]"),
        (lambda s: s | {"AuxLogits.fc.bias": torch.zeros(3)}, "an unknown tensor 'AuxLogits.fc.bias'"),
        (lambda s: s | {"fc.bias": torch.full((1008,), torch.nan)}, "fc.bias holds NaN"),
        (lambda s: list(s.values()), "expected tensors by name"),
        (lambda s: {"state_dict": {}}, "expected tensors by name"),
    ],
)
def test_other_weights_than_inception_s_are_refused(state: dict[str, Tensor], change: Callable, words: str):
    with pytest.raises(ValueError, match=words):
        with_weights(change(state))


def test_files_that_are_no_weights_are_refused_in_one_line(models: tuple[Path, Path], clip_folder: Path, tmp_path: Path, cli):
    ask = ("evaluate", *models, "--samples", SAMPLES, "--steps", 1, "--output", tmp_path / "out")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Hostile(), protocol=2))
    torch.save({"fc.weight": Hostile()}, tmp_path / "hostile.pth")
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    other = cli(*ask, "--inception-weights", tmp_path / "other.pth").error
    assert "other.pth: not the weights of the FID's Inception v3: no tensor Conv2d_1a_3x3.conv.weight" in other
    for name in ("empty.pth", "plain.pkl", "hostile.pth"):
        refused = cli(*ask, "--inception-weights", tmp_path / name)
        assert "no file of weights alone" in refused.error and "unpickled" not in refused.out
    assert "no such file; --inception-weights takes" in cli(*ask, "--inception-weights", tmp_path / "none.pth").error
    assert "no config.json" in cli(*ask, "--clip-weights", tmp_path).error
    assert not (tmp_path / "out").exists()


def test_clip_folders_that_lack_something_are_refused(clip_folder: Path, tmp_path: Path):
    import shutil

    from safetensors.torch import load_file, save_file

    whole = load_file(clip_folder / "model.safetensors")
    less = {k: v for k, v in whole.items() if k != "visual_projection.weight"}
    wrong = whole | {"visual_projection.weight": torch.zeros(24, 31)}
    shapes = r"visual_projection.weight is \[24, 31\], expected \[24, 32\]"
    for state, words in ((less, "it lacks 1 tensors, the first is visual_projection.weight"), (wrong, shapes)):
        folder = tmp_path / words[:2]
        shutil.copytree(clip_folder, folder)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=words):
            load_clip(folder)
    pickled = tmp_path / "pickled"
    shutil.copytree(clip_folder, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(whole, pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no CLIP model that can be loaded: .*model\.safetensors"):
        load_clip(pickled)
