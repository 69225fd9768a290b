"""Settings: one flat dataclass a script, filled from a recipe, a model's YAML and the command line.

A setting is one line of a dataclass below: its type, its default and its help. The command line flags, `--help`, the
check of what a YAML holds and the record in the checkpoint are all made from that line. What comes later wins:

    the defaults here  <  the recipe that the model's YAML names  <  the YAML's `train:`  <  the command line

A recipe may name another one (`recipe: imagenet`), over whose settings its own win.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from timm.data import create_transform
from timm.optim import list_optimizers

from flash_bla.configs import FOLDER, check_entries, config_path, load_yaml
from flash_bla.engine.flags import converted, parse_flags, yaml_hint
from flash_bla.models import read_config, register_config
from flash_bla.models.registry import check_name
from flash_bla.suggest import did_you_mean

Config = TypeVar("Config", bound="CommonConfig")


class RunError(ValueError):
    """Unusable input, or a run that cannot go on: the scripts print the message alone, without a traceback."""


def setting(group: str, default: Any, text: str, *, free: bool = False, cli: bool = False) -> Any:
    """A dataclass field that is a setting.

    Args:
        group: The heading of `--help` it stands under.
        default: Its default.
        text: Its help.
        free: It may change between two starts of one run, because it has no part in the result.
        cli: It is given on the command line alone, not in a YAML.
    """
    metadata = {"group": group, "help": text, "free": free, "cli": cli}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class CommonConfig:
    """The settings that training and evaluation share."""

    model: str | None = setting("model", None, "name of a flash_bla or timm model", cli=True)
    model_kwargs: dict = setting("model", {}, "arguments of the model, as key=value ...", cli=True)
    pretrained: bool = setting("model", False, "start from the weights that timm knows for the model")
    num_classes: int | None = setting("model", None, "number of classes; none: as many as the data have")
    in_chans: int | None = setting("model", None, "channels of an image; none: the model's own")
    img_size: list[int] | int | None = setting(
        "model", None, "image size, one number or height width; none: the model's own"
    )

    dataset: str = setting(
        "data", "folder", "'folder' (ROOT/SPLIT/CLASS/IMAGE), 'digits' (embedded), or a name of timm's dataset factory"
    )
    data_dir: str | None = setting("data", None, "root folder of the data set", free=True)
    val_split: str = setting("data", "validation", "name of the split to evaluate on")
    download: bool = setting("data", False, "let the data set be downloaded, where its reader can", free=True)
    workers: int | None = setting(
        "data",
        None,
        "data loading processes of a process; none: one for each of its CPU cores, up to 16",
        free=True,
    )
    loader_timeout: float = setting(
        "data", 600.0, "seconds without a batch after which a loader process counts as hanging; 0: never", free=True
    )
    mean: list[float] | None = setting("data", None, "mean of each channel; none: the model's own")
    std: list[float] | None = setting("data", None, "standard deviation of each channel; none: the model's own")
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] | None = setting(
        "data", None, "how an image is resized; none: the model's own"
    )
    crop_pct: float | None = setting("data", None, "evaluation: part of a side that is cropped; none: the model's own")
    crop_mode: Literal["center", "squash", "border"] | None = setting(
        "data", None, "evaluation: how an image is made square; none: the model's own"
    )

    batch_size: int = setting("run", 128, "images in one forward pass of one process", free=True)
    precision: Literal["fp32", "bf16", "fp16"] = setting("run", "fp32", "arithmetic of the forward pass")
    device: str | None = setting("run", None, "cuda, cpu, ...; none: the GPU where there is one", free=True)
    threads: int | None = setting(
        "run", None, "CPU threads of PyTorch, whose number can change the last bits; none: its own choice", free=True
    )


@dataclass
class TrainConfig(CommonConfig):
    """The settings of `train.py`."""

    config: str | None = setting("model", None, "YAML of the model, in place of --model", free=True, cli=True)
    recipe: str | None = setting(
        "model", None, "name or file of a recipe, in place of the one that the YAML names", free=True, cli=True
    )
    weights: str | None = setting("model", None, "checkpoint, state dict or safetensors file to fine-tune from")
    replace_attention: bool = setting(
        "model",
        False,
        "the --weights are those of a vision transformer with softmax attention: take over what is not the attention's "
        "own, and begin with a classifier of zeros",
    )
    drop_path: float | None = setting("model", None, "stochastic depth rate; none: the model's own")
    freeze_backbone: bool = setting("model", False, "train the classifier alone (linear probe)")
    freeze: list[str] | None = setting(
        "model", None, "do not train the parameters whose names match one of these patterns, as 'blocks.[0-5].*'"
    )
    lora: int | None = setting(
        "model", None, "train adapters of this rank on the linear layers of the blocks, and the classifier (needs peft)"
    )
    grad_checkpointing: bool = setting("model", False, "recompute activations in the backward pass", free=True)
    compile: bool = setting("model", False, "torch.compile the model", free=True)
    cuda_graphs: bool = setting(
        "model", False, "with --compile: replay the kernels of model and augmentation as CUDA graphs, past the host",
        free=True,
    )  # fmt: skip

    train_split: str = setting("data", "train", "name of the split to train on")
    in_memory: bool = setting(
        "data",
        False,
        "decode all images once and keep them on the device, where they are augmented: for small data sets of images "
        "of one size, that of the model or smaller",
    )

    device_augment: bool = setting(
        "augmentation", False, "augment on the device: loader processes decode and crop, and do no more"
    )
    scale: list[float] = setting("augmentation", [0.08, 1.0], "random crop: range of its area")
    ratio: list[float] = setting("augmentation", [0.75, 4 / 3], "random crop: range of its aspect ratio")
    hflip: float = setting("augmentation", 0.5, "probability of a horizontal flip")
    vflip: float = setting("augmentation", 0.0, "probability of a vertical flip")
    color_jitter: float | None = setting("augmentation", None, "colour jitter; without effect beside --aa")
    aa: str | None = setting("augmentation", None, "timm's policy string, as rand-m9-mstd0.5-inc1")
    reprob: float = setting("augmentation", 0.0, "probability of random erasing")
    remode: Literal["const", "rand", "pixel"] = setting("augmentation", "pixel", "what random erasing fills with")
    recount: int = setting("augmentation", 1, "rectangles of a random erasing")
    repeated_aug: int = setting("augmentation", 1, "differently augmented copies of an image in a batch")
    mixup: float = setting("augmentation", 0.0, "mixup alpha; 0: none")
    cutmix: float = setting("augmentation", 0.0, "cutmix alpha; 0: none")
    mixup_prob: float = setting("augmentation", 1.0, "probability that a batch is mixed")
    mixup_switch_prob: float = setting("augmentation", 0.5, "probability of cutmix where both are on")
    smoothing: float = setting("augmentation", 0.1, "label smoothing")

    teacher: str | None = setting(
        "distillation",
        None,
        "flash_bla or timm model to learn from, with the weights that timm knows for it or --teacher-weights",
    )
    teacher_weights: str | None = setting(
        "distillation", None, "the teacher's file of weights; a checkpoint of train.py says itself which model it is of"
    )
    distill: Literal["soft", "hard"] = setting(
        "distillation", "hard", "learn the teacher's probabilities (soft), or the class that it finds likeliest (hard)"
    )
    distill_alpha: float = setting("distillation", 0.5, "share of the teacher in the loss; the labels have the rest")
    distill_tau: float = setting("distillation", 1.0, "soft: temperature of the probabilities")

    epochs: int = setting("optimisation", 100, "epochs of the cosine schedule, warm-up included")
    grad_accum: int = setting("optimisation", 1, "forward passes in one update", free=True)
    opt: str = setting("optimisation", "adamw", "optimizer, by its name in timm")
    lr: float = setting("optimisation", 5e-4, "learning rate for a total batch of --lr-batch images")
    lr_batch: int = setting("optimisation", 512, "total batch that --lr is meant for; 0: take --lr as it is")
    lr_scale_all: bool = setting("optimisation", False, "scale --warmup-lr and --min-lr by the total batch too")
    warmup_epochs: float = setting("optimisation", 5.0, "epochs of linear warm-up")
    warmup_lr: float = setting("optimisation", 1e-6, "learning rate at the start of the warm-up")
    min_lr: float = setting("optimisation", 1e-5, "learning rate at the end of the schedule")
    cooldown_epochs: int = setting("optimisation", 0, "further epochs at --min-lr")
    sched_on_epochs: bool = setting("optimisation", False, "let the learning rate stay the same within an epoch")
    weight_decay: float = setting("optimisation", 0.05, "weight decay (none on biases and other 1-D parameters)")
    betas: list[float] = setting("optimisation", [0.9, 0.999], "the optimizer's betas")
    eps: float = setting("optimisation", 1e-8, "the optimizer's epsilon")
    layer_decay: float | None = setting("optimisation", None, "factor on the rate for each layer below the head")
    clip_grad: float | None = setting("optimisation", None, "clip the gradient's norm to this")
    ema_decay: float | None = setting("optimisation", None, "decay of the weights' moving average; none: no average")
    ema_batch: int = setting("optimisation", 0, "total batch that --ema-decay is meant for; 0: take it as it is")
    ema_warmup: bool = setting("optimisation", False, "shorter average at the start of the run")
    mesa: float = setting(
        "optimisation",
        0.0,
        "weight of a further loss from a quarter of --epochs on: cross entropy to what the averaged weights predict",
    )
    sync_bn: bool = setting("optimisation", False, "let batch norms see the images of all processes (CUDA)")
    max_nonfinite: int = setting(
        "optimisation", 20, "stop after so many updates in a row without a finite loss and gradient", free=True
    )

    output: str | None = setting("run", None, "output folder; none: runs/MODEL-DATASET", free=True)
    seed: int = setting("run", 0, "seed of weights, data order and augmentation")
    eval_every: int = setting("run", 1, "evaluate after every so many epochs, and after the last", free=True)
    log_every: int = setting("run", 50, "updates between two log entries", free=True)
    preview: bool = setting("run", True, "write preview.png, the first batch as the model gets it", free=True)
    save_epochs: int = setting("run", 1, "epochs between two checkpoints", free=True)
    save_minutes: float = setting("run", 10.0, "minutes between two checkpoints within an epoch; 0: none", free=True)
    save_updates: int = setting("run", 0, "updates between two checkpoints within an epoch; 0: none", free=True)

    @property
    def compile_mode(self) -> str | None:
        """The mode of torch.compile."""
        return "reduce-overhead" if self.cuda_graphs else None

    def learning_rates(self, total_batch: int) -> dict[str, float]:
        """The learning rates for a total batch: `lr`, `warmup_lr` and `min_lr`.

        Raises:
            RunError: The schedule would rise from `lr` to `min_lr`.
        """
        factor = total_batch / self.lr_batch if self.lr_batch else 1.0
        others = factor if self.lr_scale_all else 1.0
        rates = {"lr": self.lr * factor, "warmup_lr": self.warmup_lr * others, "min_lr": self.min_lr * others}
        if rates["lr"] < rates["min_lr"]:
            scaled = f" ({self.lr:g} for {self.lr_batch} images, scaled to {total_batch})" if self.lr_batch else ""
            raise RunError(f"lr: at least min_lr, {rates['min_lr']:g}, got {rates['lr']:g}{scaled}; lower --min-lr too")
        return rates

    def averaging(self, total_batch: int) -> dict[str, float]:
        """The moving average's decay for a total batch, `ema_decay`; nothing where the run keeps no average.

        After as many images as the decay is meant for, the average has forgotten equally much with any batch.
        """
        if self.ema_decay is None:
            return {}
        return {"ema_decay": self.ema_decay ** (total_batch / self.ema_batch if self.ema_batch else 1.0)}


@dataclass
class EvalConfig(CommonConfig):
    """The settings of `eval.py`."""

    checkpoint: str | None = setting("model", None, "checkpoint of train.py; with --model, any file of weights")
    use_ema: bool = setting("model", True, "take the averaged weights where the file has them")
    sizes: list[int] | None = setting("model", None, "evaluate at each of these square sizes, in place of --img-size")
    suite: list[str] | None = setting(
        "data",
        None,
        "imagenet, imagenet-real, -v2, -a, -r or -sketch, or several of them, each as NAME=FOLDER or as NAME alone for "
        "the folder --data-dir; in place of --dataset",
    )
    dataset: str | None = setting("data", None, "as for train.py; none: the checkpoint's")
    data_dir: str | None = setting("data", None, "root folder of the data set; none: the checkpoint's")
    val_split: str | None = setting("data", None, "name of the split to evaluate on; none: the checkpoint's")
    image: list[str] | None = setting("data", None, "print the five best classes of these pictures instead")
    output: str | None = setting("run", None, "write the results to OUTPUT.json, OUTPUT.csv and OUTPUT.classes.csv")
    compare: list[str] | None = setting(
        "run", None, "print a table of these OUTPUT.json instead, and draw it to the OUTPUT.png of --output"
    )


def parse_train(argv: Sequence[str] | None = None) -> TrainConfig:
    """The settings of a training run from its command line and the YAMLs that it names.

    A model of `--config` is registered on the way, so that `model` is the name to create it by. A packaged model that
    is given by name comes with the recipe of its YAML, exactly as with `--config` on that file.

    Raises:
        RunError: A YAML holds an unknown key or a wrong type, or the settings contradict each other.
    """
    usage = "train.py (--config FILE | --model NAME) [settings]"
    given = parse_flags(TrainConfig, usage, "Train an image classifier.", argv)
    if ("config" in given) == ("model" in given):
        raise RunError("name the model: either --config FILE or --model NAME")
    values: dict[str, Any] = {}
    try:
        path = given.get("config") or FOLDER / f"{given['model'].split('.')[0]}.yaml"
        recipe, train = given.get("recipe"), {}
        if "model" in given:
            check_name(given["model"])  # here, before a folder of millions of images is read
        if "config" in given or path.is_file():
            values["model"] = register_config(path)
            model_config = read_config(path)
            recipe, train = recipe or model_config.recipe, model_config.train
        if recipe:
            values |= read_recipe(recipe)
        values |= check_settings(TrainConfig, train, f"{path}: train")
    except (OSError, ValueError) as error:
        raise RunError(str(error)) from error
    config = TrainConfig(**(values | given))
    if config.output is None:
        config.output = "runs/" + f"{config.model}-{config.dataset}".replace("/", "-")
    kept = Path(config.output) / "config.yaml"
    for name in ("config", "recipe"):
        if given.get(name) and Path(given[name]).resolve() == kept.resolve():
            raise RunError(f"output: the run keeps its settings in {kept}, the file of --{name}; choose another folder")
    return _check_train(config)


def parse_eval(argv: Sequence[str] | None = None) -> EvalConfig:
    """The settings of an evaluation from its command line.

    Raises:
        RunError: Neither a checkpoint nor a model is named, or the settings contradict each other.
    """
    usage = "eval.py (--checkpoint FILE | --model NAME | --compare FILES) [settings]"
    config = EvalConfig(**parse_flags(EvalConfig, usage, "Evaluate an image classifier.", argv))
    if not (config.checkpoint or config.model or config.compare):
        raise RunError("name what to evaluate: --checkpoint FILE, --model NAME, or both")
    for one, other in (("sizes", "img_size"), ("suite", "dataset")):
        if getattr(config, one) and getattr(config, other):
            raise RunError(f"{one}: it takes the place of {other}, give one of them")
    if config.image and config.output:
        raise RunError("output: the classes of single pictures are printed alone, leave it out beside image")
    if config.image and config.sizes:
        raise RunError("sizes: single pictures are looked at in one size, give img_size beside image")
    if config.model:
        try:
            check_name(config.model)  # before a checkpoint is read
        except ValueError as error:
            raise RunError(str(error)) from error
    if config.sizes and min(config.sizes) < 1:
        raise RunError(f"sizes: must be at least 1, got {config.sizes}")
    return _check_common(config)


def read_recipe(recipe: str, above: Sequence[Path] = ()) -> dict[str, Any]:
    """The settings of a recipe, and below them those of the recipe that it names itself.

    Args:
        recipe: Its name in the package (`deit`), or a YAML file, from where the recipe stands that names it.
        above: The files of the recipes that led to this one.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: No recipe has that name, it holds what is no setting, or it builds on itself.
    """
    path = Path(recipe) if recipe.endswith((".yaml", ".yml")) else config_path(f"recipes/{recipe}")
    chain = [*above, path.resolve()]
    if chain[-1] in above:
        raise ValueError(f"{path}: the recipe builds on itself: {' -> '.join(map(str, chain))}")
    content = load_yaml(path)
    base = content.pop("recipe", None)
    check_entries({"recipe": base}, {"recipe": str | None}, str(path))
    settings = check_settings(TrainConfig, content, str(path))
    if base and base.endswith((".yaml", ".yml")):
        base = str(path.parent / base)
    return (read_recipe(base, chain) if base else {}) | settings


def check_settings(kind: type[Config], values: dict[str, Any], where: str) -> dict[str, Any]:
    """The settings that a YAML holds, with keys and types checked.

    Raises:
        ValueError: A key is no setting or a value has a wrong type; `where`, the key and what is valid are named.
    """
    hints = get_type_hints(kind)
    check_entries(values, {f.name: yaml_hint(hints[f.name]) for f in fields(kind) if not f.metadata["cli"]}, where)
    return {key: converted(value, hints[key]) for key, value in values.items()}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two runs' settings, leaving out those that have no part in the result.

    A setting that is younger than the old run had its default there. The number of held-out images is left out, too: a
    run that ended at one that cannot be read must be able to go on without it.
    """
    free = {f.name for f in fields(TrainConfig) if f.metadata["free"]} | {"val_images"}
    old, new = (as_dict(TrainConfig()) | settings for settings in (old, new))
    keys = [key for key in {**old, **new} if key not in free]
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]


def as_dict(config: CommonConfig) -> dict[str, Any]:
    """The settings as plain containers."""
    return asdict(config)


def _check_common(config: Config) -> Config:
    if config.img_size is not None and len(config.img_size) not in (1, 2):
        raise RunError(f"img_size: one number or height and width, got {config.img_size}")
    for name in ("num_classes", "in_chans"):  # data and checks go by the setting
        if name in config.model_kwargs:
            raise RunError(f"model_kwargs: {name} has a flag of its own, --{name.replace('_', '-')}")
    for name in ("batch_size", "in_chans", "num_classes", "threads"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise RunError(f"{name}: must be at least 1, got {getattr(config, name)}")
    if config.workers is not None and config.workers < 0:
        raise RunError(f"workers: must be at least 0, got {config.workers}")
    if config.crop_pct is not None and not 0 < config.crop_pct <= 1:
        raise RunError(f"crop_pct: more than 0, at most 1, or none, got {config.crop_pct:g}")
    if config.loader_timeout < 0:
        raise RunError(f"loader_timeout: must be at least 0, got {config.loader_timeout:g}")
    return config


NOT_NEGATIVE = ("lr", "warmup_lr", "min_lr", "warmup_epochs", "cooldown_epochs", "weight_decay", "mixup", "cutmix",
                "ema_batch", "mesa")  # fmt: skip
PROBABILITIES = ("hflip", "vflip", "reprob", "mixup_prob", "mixup_switch_prob")


def _check_train(config: TrainConfig) -> TrainConfig:
    _check_common(config)
    for name in ("epochs", "grad_accum", "repeated_aug", "eval_every", "log_every", "save_epochs", "max_nonfinite"):
        if getattr(config, name) < 1:
            raise RunError(f"{name}: must be at least 1, got {getattr(config, name)}")
    for name in ("scale", "ratio", "betas"):
        if len(getattr(config, name)) != 2:
            raise RunError(f"{name}: two numbers, got {getattr(config, name)}")
    (low, high), (narrow, wide) = config.scale, config.ratio
    for name, holds, wanted in (
        ("scale", 0 < low <= high <= 1, "more than 0 and at most 1, the smaller first"),
        ("ratio", 0 < narrow <= wide, "more than 0, the smaller first"),
        ("smoothing", 0 <= config.smoothing < 1, "at least 0 and less than 1"),
        ("drop_path", 0 <= (config.drop_path or 0) < 1, "at least 0 and less than 1, or none"),
        ("betas", all(0 <= beta < 1 for beta in config.betas), "at least 0 and less than 1"),
        *((name, getattr(config, name) >= 0, "at least 0") for name in NOT_NEGATIVE),
        *((name, 0 <= getattr(config, name) <= 1, "from 0 to 1") for name in PROBABILITIES),
        ("layer_decay", config.layer_decay is None or 0 < config.layer_decay <= 1, "more than 0, at most 1, or none"),
        ("clip_grad", (config.clip_grad or 0) >= 0, "at least 0, or none"),
    ):
        if not holds:
            raise RunError(f"{name}: {wanted}, got {getattr(config, name)}")
    if config.opt.lower().split("_")[-1] not in list_optimizers():  # before it stands how it is wrapped
        raise RunError(f"opt: timm has no optimizer {config.opt!r}{did_you_mean(config.opt, list_optimizers())}")
    try:
        create_transform(224, is_training=True, auto_augment=config.aa)
    except (AssertionError, LookupError, ValueError) as error:
        raise RunError(f"aa: no policy of timm, got {config.aa!r}: {error}") from error
    if config.warmup_epochs >= config.epochs:
        raise RunError(f"warmup_epochs: must be less than epochs ({config.epochs}), got {config.warmup_epochs:g}")
    if config.ema_decay is not None and not 0 < config.ema_decay < 1:
        raise RunError(f"ema_decay: between 0 and 1, or none, got {config.ema_decay}")
    if config.mesa and config.ema_decay is None:
        raise RunError(f"mesa: {config.mesa:g} learns from the averaged weights, but ema_decay is none")
    if config.cuda_graphs and not config.compile:
        raise RunError("cuda_graphs: only with compile")
    if config.cuda_graphs and config.grad_accum > 1:
        # PyTorch would be silently wrong: a graph's next replay writes over the gradients that the last one left
        raise RunError(f"cuda_graphs: gradients cannot be summed over passes, got grad_accum {config.grad_accum}")
    if config.replace_attention and not config.weights:
        raise RunError("replace_attention: name the file to take over with --weights")
    if config.lora is not None and config.lora < 1:
        raise RunError(f"lora: a rank of at least 1, got {config.lora}")
    training = [name for name in ("freeze_backbone", "freeze", "lora") if getattr(config, name)]
    if len(training) > 1:
        raise RunError(f"{training[0]}: says what to train, and so does {training[1]}; choose one of them")
    if config.replace_attention and training and not config.freeze:
        raise RunError(f"{training[0]}: would leave the new attention untrained; without replace_attention only")
    if not 0 <= config.distill_alpha <= 1:
        raise RunError(f"distill_alpha: between 0 and 1, got {config.distill_alpha:g}")
    if config.distill_tau <= 0:
        raise RunError(f"distill_tau: more than 0, got {config.distill_tau:g}")
    if (config.mixup or config.cutmix) and config.batch_size % 2:
        raise RunError(f"batch_size: mixup and cutmix mix pairs and want an even number, got {config.batch_size}")
    return config
