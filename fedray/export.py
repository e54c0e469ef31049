"""From a run folder to a folder in peft's own format."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from fedray import config
from fedray.errors import ConfigError, DataError
from fedray.experiment import plan
from fedray.learner import Learner
from fedray.peft.parts import Tuned
from fedray.peft.saving import save_adapter


def export(run: str | Path, folder: str | Path) -> Path:
    """Save the final model of a run, tuned by LoRA or IA3, as ``PeftModel.from_pretrained`` loads it.

    The base is what ``AutoModel.from_pretrained`` makes of the run's ``task.model.path``. The classification head,
    which no AutoModel has, is written beside as ``head.safetensors``.

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
        model = learner.load(load_file(file))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{file} does not fit the run's own configuration ({error})") from error
    tuned = [module for module in model.modules() if isinstance(module, Tuned)]
    if not tuned:
        raise ConfigError(f"{run} trained no pre-trained model; there is nothing to export in peft's format")
    trunk = tuned[0].trunk
    inside = "vision_model." if type(trunk).__name__.endswith("VisionModel") else ""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    head = model.get_submodule("head") if any(name.startswith("head.") for name in trained) else None
    save_adapter(trunk, head, folder, values["task"]["model"]["path"], inside)
    return folder
