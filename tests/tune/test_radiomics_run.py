"A run that is asked what its features tell of radiomic values: from the training to the table of the report."
from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vfm_notes.analysis.radiomics import lens_table
from vfm_notes.analysis.tables import load_tables
from vfm_notes.backbones.protocol import build_backbone
from vfm_notes.data.radiomics import radiomics_absent, radiomics_table
from vfm_notes.foundation.places import run_folder
from vfm_notes.foundation.spec import RunSpec, canonical_text, run_id
from vfm_notes.runs.record import new_record, write_record
from vfm_notes.shift.lens import FOLDS, PENALTIES
from vfm_notes.tune import catalog
from vfm_notes.tune.transfer import run_cohort, transfer

CASES = {"pretrain": 0, "train": 4, "val": 2, "test": 16}
SPEC = RunSpec(size=(8, 32, 32), spacing=(6.0, 2.25, 2.25), cases=CASES, n_train=4, epochs=1, lr=0.01,
               task="segmentation", backbone="profound_toy.made", strategy="full", parent="pretrain-made-00000000",
               radiomics=True)


def test_what_is_off_is_no_part_of_a_name():
    off = replace(SPEC, radiomics=False)
    assert "radiomics" not in canonical_text(off) and run_id(off) != run_id(SPEC)


@pytest.mark.skipif(bool(radiomics_absent()), reason="pyradiomics is not installed: vfm_notes[radiomics]")
def test_from_the_training_to_the_table(runs_root):
    state, found = build_backbone("profound_toy", 3).state_dict(), {}
    for strategy in ("full", "probe"):
        spec = replace(SPEC, strategy=strategy)
        result = found[strategy] = transfer(spec, state)
        write_record(run_folder("lens", run_id(spec)), new_record(spec, "lens", **result.summary), result.curves,
                     result.cases, result.features, radiomics=result.radiomics)
    rows = found["probe"].radiomics
    assert rows.case.nunique() == 16 and set(rows.when) == {"before", "after", "random"}
    frozen = rows.pivot(index=["case", "region", "family"], columns="when", values="value")
    assert np.allclose(frozen.before, frozen.after) and not np.allclose(frozen.before, frozen.random)

    cohort = run_cohort(SPEC)
    values = radiomics_table(cohort, "test").query("region == 'gland with lesion' and family == 'shape'")
    wide = values.pivot(index="case", columns="feature", values="value")
    names, full = list(cohort.subset("test").names), found["full"]
    last = [k for k in full.features if k.startswith("after.")][-1]
    for when in ("before", "after"):
        x = full.features[last.replace("after.", f"{when}.")].astype(float)[[names.index(c) for c in wide.index]]
        ridge = make_pipeline(StandardScaler(), RidgeCV(PENALTIES))
        told = [cross_val_predict(ridge, x, y, groups=wide.index, cv=GroupKFold(FOLDS)) for y in wide.to_numpy().T]
        alone = np.mean([r2_score(y, t) for y, t in zip(wide.to_numpy().T, told)])
        own = full.radiomics.query(f"when == '{when}' and region == 'gland with lesion' and family == 'shape'")
        assert own.value.mean() == pytest.approx(alone, abs=1e-6) and own.features.iloc[0] == wide.shape[1]

    table = lens_table(load_tables("lens")).set_index(["strategy", "region", "family"])
    assert table.loc[("full", "gland with lesion", "shape"), "after"] == pytest.approx(alone, abs=1e-6)
    assert (table.loc["probe"].change == 0).all() and table.loc["probe"].p.isna().all()
    assert set(table.index.get_level_values("family")) == {"first order", "shape", "texture"}
