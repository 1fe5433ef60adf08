"""The manifest itself: one literal list, read by `weights.py`. Facts only.

Hashes are of the published files. Where an author gives none (SSCD, SCRFD), the hash is the one that several projects
pin independently for the same file; where none could be found, the first pull pins what it got (`weights.py`).
`hub` entries are (repository, file) of the Hugging Face hub; `url` entries are plain downloads.
"""

from dataclasses import dataclass
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class Weight:
    """One file of weights. `input` says what a scorer feeds it; `clip_tags` are `model:pretrained` names it answers."""

    name: str
    licence: str
    input: str
    sha256: str | None = None
    size_bytes: int | None = None
    url: str | None = None
    hub: tuple[str, str] | None = None
    whole: bool = False  # of the repository all that `transformers` reads belongs to it
    clip_tags: tuple[str, ...] = ()
    note: str = ""

    @property
    def source(self) -> str:
        """Where it comes from, for people."""
        return self.url or (f"hf://{'/'.join(self.hub)}" if self.hub else self.note)

    @property
    def file_name(self) -> str:
        """The published file's name."""
        return unquote(urlsplit(self.url).path.rsplit("/", 1)[-1]) if self.url else (self.hub or ("", self.name))[1]


_CLIP = "open_clip_model.safetensors"
_V2 = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
_V1 = "https://github.com/LAION-AI/aesthetic-predictor/raw/main/"
_NSFW = "https://github.com/LAION-AI/CLIP-based-NSFW-Detector/raw/main/"
_YUNET = "https://github.com/ShiqiYu/libfacedetection.train/raw/master/onnx/"
_L14 = "OpenAI CLIP ViT-L/14 image features, unit length"
_B32 = "OpenAI CLIP ViT-B/32 image features, unit length"
_B16 = "OpenAI CLIP ViT-B/16 image features, unit length"

_ENTRIES = (
    Weight(
        "clip-vit-b32-openai", "MIT", "image 224, text", hub=("timm/vit_base_patch32_clip_224.openai", _CLIP),
        clip_tags=("ViT-B-32-quickgelu:openai",),
    ),
    Weight(
        "clip-vit-b16-openai", "MIT", "image 224, text", hub=("timm/vit_base_patch16_clip_224.openai", _CLIP),
        clip_tags=("ViT-B-16-quickgelu:openai",),
    ),
    Weight(
        "clip-vit-l14-openai", "MIT", "image 224, text", hub=("timm/vit_large_patch14_clip_224.openai", _CLIP),
        clip_tags=("ViT-L-14-quickgelu:openai",),
    ),
    Weight(
        "aesthetic-v2-sac-logos-ava1-l14-linear", "Apache-2.0", _L14,
        "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0", 3_714_759,
        _V2 + "sac%2Blogos%2Bava1-l14-linearMSE.pth",
    ),
    Weight(
        "aesthetic-v2-ava-logos-l14-linear", "Apache-2.0", _L14,
        "390a3aafaf3b37d57148f9b22f30556de38343064b7d915acfa80d3812b4c9ff", 3_714_759,
        _V2 + "ava%2Blogos-l14-linearMSE.pth",
    ),
    Weight(
        "aesthetic-v2-ava-logos-l14-relu", "Apache-2.0", _L14,
        "0af3254c651d55b7ea851429c20f26ec880bb0169805a4df85b814bd7966f3e4", 3_714_887,
        _V2 + "ava%2Blogos-l14-reluMSE.pth",
    ),
    Weight(
        "aesthetic-v1-l14", "MIT", _L14, "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba", 4_071,
        _V1 + "sa_0_4_vit_l_14_linear.pth",
    ),
    Weight(
        "aesthetic-v1-b32", "MIT", _B32, "c7b14cead230694acc7b9447974d3cad78003c72da032e402a303b6c2429e85f", 3_047,
        _V1 + "sa_0_4_vit_b_32_linear.pth",
    ),
    Weight(
        "aesthetic-v1-b16", "MIT", _B16, "8ad3923d7ecf019df20ecd2ab5542a3075fbba0278d239c0371345f3d7fcbde0", 3_047,
        _V1 + "sa_0_4_vit_b_16_linear.pth",
    ),
    Weight(
        "laion-nsfw-l14", "MIT", f"{_L14}, rounded to float16",
        "905520bb0336accc73ee282c605d926aef90cf14248889d44b9cee50eef71f8a", 1_094_585,
        _NSFW + "clip_autokeras_binary_nsfw.zip",
    ),
    Weight(
        "laion-nsfw-b32", "MIT", f"{_B32}, rounded to float16",
        "78715ab9d64485167e8c9ade3b8e6761a17a16c24d114bd47431ac1dab46462b", 231_831,
        _NSFW + "clip_autokeras_nsfw_b32.zip",
    ),
    Weight(
        "yunet-n-dynamic", "Apache-2.0", "image, BGR, any multiple of 32",
        "104ee26c71d5c270ce79a6b3dced91c91013260d29a6bf18f9296c5b8c4c2b12", 322_906,
        _YUNET + "yunet_n_dynamic.onnx",
    ),
    Weight(
        "yunet-n-640", "Apache-2.0", "image 640, BGR",
        "25a606a145a5b6d7271ae138fbd00eba91dad8b83222ae3f2c7ecd0f4a7b0e31", 317_466,
        _YUNET + "yunet_n_640_640.onnx",
    ),
    Weight(
        "opennsfw2", "BSD-2-Clause (Yahoo), MIT (opennsfw2)", "image 224, BGR less channel means",
        url="https://github.com/bhky/opennsfw2/releases/download/v0.1.0/open_nsfw_weights.h5",
    ),
    Weight(
        "gantman-mobilenet-v2", "MIT", "image 224, 0..1; five classes",
        "156c96cc316ab234fc2f57afe3acfc8dea118d97d3021d201f5d09e5288fd72f", 10_511_444,
        note="nsfwjs's MobileNet v2 (infinitered/nsfwjs, GantMan/nsfw_model) converted to ONNX, e.g. with tf2onnx; no "
        "such file is published: name your own by `weights: FILE`",
    ),
    Weight(
        "scrfd-10g", "non-commercial research only (insightface)", "image 640, mean 127.5, deviation 128",
        "5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91", 16_923_827,
        hub=("public-data/insightface", "models/buffalo_l/det_10g.onnx"),
    ),
    Weight(
        "laion-watermark", "MIT", "image 256, ImageNet mean and deviation",
        url="https://github.com/LAION-AI/LAION-5B-WatermarkDetection/raw/main/models/watermark_model_v1.pt",
    ),
    Weight(
        "sscd-disc-mixup", "MIT", "image 320 or shorter side 288, ImageNet mean and deviation; a TorchScript file",
        "9f26bd4c848cc19b73d2ae92eea6e04886f61a7b764ceb7a13aeee62e6a6db56", 98_791_638,
        "https://dl.fbaipublicfiles.com/sscd-copy-detection/sscd_disc_mixup.torchscript.pt",
    ),
    Weight(
        "sscd-disc-large", "MIT", "as sscd-disc-mixup; 1024 numbers",
        url="https://dl.fbaipublicfiles.com/sscd-copy-detection/sscd_disc_large.torchscript.pt",
    ),
    Weight(
        "smolvlm2-2.2b", "Apache-2.0", "image and a question",
        hub=("HuggingFaceTB/SmolVLM2-2.2B-Instruct", "model.safetensors.index.json"),
        whole=True,
    ),
    Weight(
        "bert-base-uncased", "Apache-2.0", "text; for num_tokens_bert (COYO does not say which BERT vocabulary)",
        hub=("google-bert/bert-base-uncased", "tokenizer.json"),
    ),
    Weight("gpt2", "MIT", "text; for num_tokens_gpt", hub=("openai-community/gpt2", "tokenizer.json")),
    Weight(
        "dinov2-base", "Apache-2.0", "image 224", hub=("facebook/dinov2-base", "model.safetensors"), whole=True,
    ),
)  # fmt: skip

MANIFEST = {weight.name: weight for weight in _ENTRIES}
