# SPDX-License-Identifier: Apache-2.0
"""Expert LoRA on activations for stock PEFT, and the choice of the experts to train."""
