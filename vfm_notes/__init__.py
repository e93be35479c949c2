"""Which pretrained vision model should I fine-tune for my medical imaging task, how, and could I have known before?"""
__version__ = "0.1.0"
__all__ = ["distance_to_pretraining", "gain", "load_backbone", "load_cohort", "load_study", "mmd2", "run_study", "two_sample_test"]

TYPE_CHECKING = False  # True for editors and type checkers, which read what is imported here without running it
if TYPE_CHECKING:
    from .analysis.gain import gain
    from .data.load import load_cohort
    from .foundation.spec import load_study
    from .runs.batch import run_study
    from .shift.features import distance_to_pretraining
    from .shift.mmd import mmd2, two_sample_test
    from .tune.catalog import load_backbone

_MODULES = {"distance_to_pretraining": "shift.features", "gain": "analysis.gain", "load_backbone": "tune.catalog",
            "load_cohort": "data.load", "load_study": "foundation.spec", "mmd2": "shift.mmd",
            "run_study": "runs.batch", "two_sample_test": "shift.mmd"}  # name -> the module that is imported for it


def __getattr__(name: str):
    "Import a function when it is used for the first time; its help lists every argument with its comment."
    if name not in _MODULES: raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from importlib import import_module

    from fastcore.docments import sig2str
    function = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    function.__doc__ = f"{function.__doc__}\n\n{sig2str(function)}"
    globals()[name] = function
    return function


def __dir__() -> list[str]: return sorted({*globals(), *__all__} - {"TYPE_CHECKING"})
