# SPDX-License-Identifier: Apache-2.0
"""The guard against deprecation warnings sees what code of hf_moe causes, and only that."""

import logging
import warnings

from conftest import moe_model


def test_guard_sees_what_our_code_causes(no_deprecations, monkeypatch):
    model = moe_model("llama")

    def deprecated(module, args):
        logging.getLogger("transformers.modeling_utils").warning("`foo` is deprecated, use `bar`")
        warnings.warn("`baz` will go away", FutureWarning, stacklevel=1)

    model.model.register_forward_pre_hook(deprecated)
    model(**model.dummy_inputs)
    assert len(no_deprecations.messages) == 2
    no_deprecations.messages.clear()


def test_guard_leaves_others_alone(no_deprecations):
    logging.getLogger("transformers").warning("`foo` is deprecated")
    assert no_deprecations.messages == []
