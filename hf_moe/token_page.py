# SPDX-License-Identifier: Apache-2.0
"""`routing_page`: a page on which every token of a text has the colour of the expert that serves it, layer by layer."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .training.statistics import layer_number


if TYPE_CHECKING:
    import torch


STYLE = """
:root { color-scheme: light dark; font: 16px/2 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
.tokens span { padding: .15em 0; border-radius: .2em; white-space: pre-wrap; color: #111; cursor: default; }
.tokens span.second { box-shadow: inset 0 -.25em var(--second); }
.legend span { display: inline-block; min-width: 2.2em; margin: .1em; text-align: center; border-radius: .2em; color: #111; }
small { opacity: .7; }
"""
SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const layer = document.getElementById("layer"), tokens = document.querySelectorAll(".tokens span");
const colour = expert => expert < data.numExperts ? `hsl(${360 * expert / data.numExperts} 70% 78%)` : "#ddd";
function draw() {
  const chosen = data.choices[layer.value];
  tokens.forEach((token, place) => {
    const experts = chosen[place].filter(expert => expert >= 0 && expert < data.numExperts);
    token.style.background = colour(experts[0] ?? data.numExperts);
    token.classList.toggle("second", experts.length > 1);
    token.style.setProperty("--second", colour(experts[1] ?? data.numExperts));
    token.title = experts.length ? "experts " + experts.join(", ") : "no expert";
  });
  document.getElementById("name").textContent = data.names[layer.value];
}
layer.max = data.names.length - 1;
layer.addEventListener("input", draw);
document.querySelectorAll(".legend span").forEach((of, expert) => of.style.background = colour(expert));
draw();
"""


def routing_page(
    tokens: Sequence[str],
    choices: "Mapping[str, torch.Tensor]",
    num_experts: int,
    path: str | Path | None = None,
    title: str = "Routing",
) -> str:
    """
    An HTML page with the tokens of a text in the colours of their experts; a slider chooses the layer.

    Args:
        tokens (`Sequence[str]`): The text of each token.
        choices (`Mapping[str, torch.Tensor]`): By the name of the router `(T, K)` chosen experts, the first one first, as
            [`RouterReplay.record`] gives them.
        num_experts (`int`): Number of experts in a layer.
        path (`str` or `Path`, *optional*): Where to save the page.
        title (`str`, *optional*, defaults to `"Routing"`): Its title.

    Returns:
        `str`: the page, which needs no other file.

    Raises:
        ValueError: if choices and tokens are not as many.

    Example:

    ```python
    >>> replay = RouterReplay(model)
    >>> with replay.record() as choices, torch.no_grad():
    ...     model(input_ids)
    >>> routing_page(tokenizer.batch_decode(input_ids[0]), choices, model.config.num_experts, "routing.html")
    ```
    """
    for name, index_TK in choices.items():
        if len(index_TK) != len(tokens):
            raise ValueError(f"There are {len(tokens)} tokens, and choices of {len(index_TK)} in {name}.")
    data = {
        "numExperts": num_experts,
        "names": [f"layer {layer_number(name)}" for name in choices],
        "choices": [index_TK.tolist() for index_TK in choices.values()],
    }
    spans = "".join(f"<span>{html.escape(token)}</span>" for token in tokens)
    legend = "".join(f"<span>{expert}</span>" for expert in range(num_experts))
    # Within a script element nothing but its end has a meaning.
    content = json.dumps(data).replace("</", "<\\/")
    page = f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style></head>
<body>
<h1>{html.escape(title)}</h1>
<p><label><b id="name"></b> <input id="layer" type="range" min="0" value="0"></label></p>
<p class="tokens">{spans}</p>
<p class="legend">{legend}</p>
<p><small>Background: first expert of a token; line below it: the second.</small></p>
<script id="data" type="application/json">{content}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""
    if path is not None:
        Path(path).write_text(page, encoding="utf-8")
    return page
