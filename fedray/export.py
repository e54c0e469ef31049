"""From a run folder to a folder in peft's own format, or to a packed mask."""

import json
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fedray import config
from fedray.bits import density, final_mask, pack, unpack
from fedray.errors import ConfigError, DataError
from fedray.experiment import plan
from fedray.learner import Learner
from fedray.models import hugging_face
from fedray.models.causal_lm import AUTO as CAUSAL_LM
from fedray.models.masked import masked_layers, probabilities, unmask
from fedray.peft.factors import is_base, unwrapped
from fedray.peft.parts import Tuned
from fedray.peft.saving import is_language_model, save_adapter


def export(run: str | Path, folder: str | Path) -> Path:
    """Save the final model of a run as ``PeftModel.from_pretrained`` loads it, or as a mask.

    A model of which a mask was learnt becomes one bit a weight (``mask.safetensors``) beside the run's configuration,
    whose seed gives the frozen weights; `load_masked` makes a plain model of it.

    What peft knows is LoRA, IA3 and soft prompts. The base is what ``AutoModel.from_pretrained`` (of text,
    ``AutoModelForCausalLM``) makes of the run's ``task.model.path``. The classification head, which no AutoModel has,
    is written beside as ``head.safetensors``. If the run changed frozen weights, as FedEx-LoRA and FLoRA do, the base
    with its new weights is written to ``base`` in the folder, and the adapter names it.

    Args:
        run: A folder of a finished run; its data and its base model must be where they were.
        folder: Where to; made if it is not there.

    Raises:
        DataError: the run is not finished, or its model was tuned by another method.
    """
    run, folder = Path(run), Path(folder)
    file = run / "model.safetensors"
    if not file.is_file():
        raise DataError(f"{run} has no model.safetensors, which the last round writes; go on with: fedray resume {run}")
    values = config.read(run / "config.yaml")
    learner = Learner(plan(values).experiment.task, "cpu")
    try:
        params = load_file(file)
        model = learner.load(params)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{file} does not fit the run's own configuration ({error})") from error
    if masked_layers(model):
        return _save_mask(run, model, folder)
    tuned = [(path, module) for path, module in model.named_modules() if isinstance(module, Tuned)]
    if not tuned:
        raise ConfigError(f"{run} trained no pre-trained model; there is nothing to export in peft's format")
    [(path, module), *_] = tuned
    trunk = module.trunk
    inside = "vision_model." if type(trunk).__name__.endswith("VisionModel") else ""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    head = model.get_submodule("head") if any(name.startswith("head.") for name in trained) else None
    base = values["task"]["model"]["path"]
    changed = {f"{inside}{unwrapped(name, path)}": p for name, p in params.items() if is_base(name)}
    if changed:
        auto = CAUSAL_LM if is_language_model(trunk) else "AutoModel"
        base = str(hugging_face.save_changed(base, changed, folder / "base", auto))
    save_adapter(trunk, head, folder, base, inside)
    return folder


def load_masked(folder: str | Path) -> nn.Module:
    """The plain model of a mask that `export` saved: frozen weights of the run's seed, times the mask.

    Raises:
        DataError: there is no mask, or it is not one of the model in the configuration beside it.
    """
    folder = Path(folder)
    try:
        packed = load_file(folder / "mask.safetensors")["mask"]
        about = json.loads((folder / "mask.json").read_text())
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(
            f"{folder} holds no exported mask ({error}); make one with: fedray export RUN FOLDER"
        ) from error
    model = plan(config.read(folder / "config.yaml")).experiment.task.model()
    size = sum(layer.scores.numel() for layer in masked_layers(model))
    if about["weights"] != size or len(packed) != -(-size // 8):
        raise DataError(f"{folder} holds a mask of {about['weights']} weights; its configuration's model has {size}")
    return unmask(model, unpack(packed, size))


def _save_mask(run: Path, model: nn.Module, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    bits = final_mask(probabilities(model))
    save_file({"mask": pack(bits)}, folder / "mask.safetensors")
    shutil.copy(run / "config.yaml", folder)
    weights, kept = len(bits), int(bits.sum())
    size = {
        "weights": weights,
        "kept": kept,
        "density": density(bits),
        "bytes": -(-weights // 8),
        "bytes_two_bits": -(-weights // 4),  # with the signs of the frozen weights, for whoever has not the seed
        "bytes_float32": 4 * weights,
        "bytes_float32_kept": 4 * kept,
    }
    (folder / "mask.json").write_text(json.dumps(size, indent=2) + "\n")
    return folder
