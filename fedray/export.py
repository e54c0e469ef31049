"""From a run folder to a folder in peft's own format."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from fedray import config
from fedray.errors import ConfigError, DataError
from fedray.experiment import plan
from fedray.learner import Learner
from fedray.models import hugging_face
from fedray.peft.factors import is_base, unwrapped
from fedray.peft.parts import Tuned
from fedray.peft.saving import save_adapter


def export(run: str | Path, folder: str | Path) -> Path:
    """Save the final model of a run, tuned by LoRA or IA3, as ``PeftModel.from_pretrained`` loads it.

    The base is what ``AutoModel.from_pretrained`` makes of the run's ``task.model.path``. The classification head,
    which no AutoModel has, is written beside as ``head.safetensors``. If the run changed frozen weights, as FedEx-LoRA
    and FLoRA do, the base with its new weights is written to ``base`` in the folder, and the adapter names it.

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
        base = str(hugging_face.save_changed(base, changed, folder / "base"))
    save_adapter(trunk, head, folder, base, inside)
    return folder
