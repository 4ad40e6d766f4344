"""How equations are written: symbols with the number of their layer, as text and in LaTeX."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

PARAMETERS = {
    "weight": "W",
    "bias": "b",
    "scale": "s",
    "weight_x": "W_x",
    "weight_h": "W_h",
    "bias_n": "b_n",
    **{f"{name}.weight": f"W_{name[0]}" for name in ("query", "key", "value", "output")},
    **{f"{name}.bias": f"b_{name[0]}" for name in ("query", "key", "value", "output")},
    "mean": "μ̄",
    "var": "σ̄",
}
"""What equations call a parameter of this name; any other by its name."""

RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


class Equation(NamedTuple):
    """One equation.

    Attributes:
      left, right: its two sides; what is no equation stands on the left.
      tag: what is said beside it, such as ``BP3``.
      latex: both sides in LaTeX.
      sign: ``=``, or ``←`` where the left side is made anew from itself.
    """

    left: str
    right: str
    tag: str
    latex: str
    sign: str = "="

    def __str__(self) -> str:
        return f"{self.left} {self.sign} {self.right}" if self.right else self.left


def numbered(symbol: str, label: str) -> str:
    """A symbol with the number of its layer: ``W_x`` of layer 2 is ``W²_x``."""
    base, low, below = symbol.partition("_")
    if len(base) > 1 and base[1:].isalnum() and base.isascii():  # a name, not a letter
        base, low, below = symbol, "", ""
    raised = label.translate(RAISED) if label.isdigit() else f"^{_grouped(label)}" if label else ""
    return f"{base}{raised}{low}{below}"


def by(name: str) -> str:
    """What ∂C/∂name is called: δ of a z."""
    return f"δ{name[1:]}" if re.fullmatch(r"z[⁰¹²³⁴⁵⁶⁷⁸⁹^].*", name) else f"∂C/∂{name}"


def _grouped(label: str) -> str:
    return label if len(label) == 1 else f"{{{label}}}"


def written(text: str, symbols: Mapping[str, str], *, positions: bool) -> list[Equation]:
    """Equations about symbols, with each as ``symbols`` calls it.

    Args:
      text: one equation a line, or several with two spaces between.
      symbols: what stands for each symbol.
      positions: whether there are positions t; without, ``_t`` and ``Σ_t`` are left out.
    """
    if not positions:
        text = re.sub(r"_t(?![A-Za-z0-9−+])", "", text.replace("Σ_t ", ""))
    return [_equation(part, symbols) for line in text.splitlines() for part in _parts(line)]


def _parts(line: str) -> Iterator[str]:
    """The equations of one line."""
    line, tag, _ = re.fullmatch(r"(.*?)(\s{2,}\([^()]*\))?(\s*)", line).groups()  # type: ignore[union-attr]
    line = re.sub(r"\s+=", " =", line.strip())
    parts = re.split(r",\s{2,}|\s{3,}(?=[^=]*? =)", line)
    for part in parts:
        yield re.sub(r"\s+", " ", part) + (f"  {tag.strip()}" if tag else "")


def _equation(part: str, symbols: Mapping[str, str]) -> Equation:
    sides, _, tag = part.partition("  (")
    sides = replaced(sides, symbols)
    sign = "←" if " ← " in sides else "="
    left, _, right = sides.partition(f" {sign} ")
    return Equation(left, right, tag.removesuffix(")"), latex(sides), sign)


def replaced(text: str, symbols: Mapping[str, str]) -> str:
    """The text with each symbol as ``symbols`` calls it, and δ^l for ∂C/∂z^l."""
    if symbols:
        names = "|".join(re.escape(s) for s in sorted(symbols, key=len, reverse=True))
        letter = r"A-Za-zα-ωΑ-Ω\u0300-\u036f′"
        symbol = rf"(\^?)(?<![{letter}_\d'])({names})(?![{letter}])(_\w|_\{{[^}}]*\}})?([ᵀ²³]|\^)?"

        def put(match: re.Match[str]) -> str:
            exponent, name, below, power = match.groups(default="")
            if name == "δ" and power == "^":  # of a gate, which has its own name there
                return match[0]
            new = symbols[name] + below
            raised = any(c in new for c in "⁰¹²³⁴⁵⁶⁷⁸⁹^/")
            if exponent:
                return f"^{{{new}{power}}}"
            return f"({new}){power}" if power and raised else new + power

        text = re.sub(symbol, put, text)
    return re.sub(r"∂C/∂z(?=[⁰¹²³⁴⁵⁶⁷⁸⁹^])", "δ", text)


_LATEX = {
    **{"α": r"\alpha", "β": r"\beta", "γ": r"\gamma", "δ": r"\delta", "ε": r"\varepsilon"},
    **{"θ": r"\theta", "κ": r"\kappa", "λ": r"\lambda", "μ": r"\mu", "π": r"\pi", "ρ": r"\rho"},
    **{"σ": r"\sigma", "φ": r"\varphi", "ω": r"\omega", "Φ": r"\Phi"},
    **{"∂": r"\partial", "∇": r"\nabla", "Σ": r"\sum", "∏": r"\prod", "√": r"\sqrt"},
    **{"⊙": r"\odot", "½": r"\frac{1}{2}", "←": r"\leftarrow", "→": r"\rightarrow", "≠": r"\neq"},
    **{"·": r"\cdot"},
    **{"∈": r"\in", "≤": r"\leq", "≥": r"\geq", "∞": r"\infty", "…": r"\dots", "‖": r"\|"},
}  # fmt: skip
_PLAIN = {"−": "-", "′": "'", "ᵀ": r"^{\top}", "⟨": r"\langle ", "⟩": r"\rangle "}
_HATS = {"\u0302": r"\hat", "\u0304": r"\bar", "\u0303": r"\tilde"}
_FUNCTIONS = ("tanh", "log", "max", "min", "exp", "sin", "cos")
_OPERATORS = ("diag", "sign", "mean", "softmax", "sigmoid")
_TOKEN = re.compile(
    r"(?P<raised>[⁰¹²³⁴⁵⁶⁷⁸⁹]+)|(?P<hat>.[\u0302\u0303\u0304])"
    r"|(?P<said>BP\d|through [^=+]*[^=+ ])"
    r"|(?P<words>[A-Za-z]{2,}(?:[ -][A-Za-z]{2,})*)|(?P<one>.)",
    re.DOTALL,
)


def latex(text: str) -> str:
    """The text in LaTeX, by a table of symbols: braces, ``_`` and ``^`` mean there what they do
    here."""
    return "".join(map(_of_token, _TOKEN.finditer(_with_roots(text)))).strip()


def _with_roots(text: str) -> str:
    """``√(…)`` as ``√{…}``."""
    before, root, after = text.partition("√(")
    if not root:
        return text
    depth, end = 1, 0
    while depth and end < len(after):
        depth += {"(": 1, ")": -1}.get(after[end], 0)
        end += 1
    return f"{before}√{{{_with_roots(after[: end - 1])}}}{_with_roots(after[end:])}"


def _of_token(match: re.Match[str]) -> str:
    kind, token = match.lastgroup, match[0]
    if kind == "raised":
        return f"^{{{''.join(str('⁰¹²³⁴⁵⁶⁷⁸⁹'.index(digit)) for digit in token)}}}"
    if kind == "hat":
        return f"{_HATS[token[1]]}{{{latex(token[0])}}}"
    if kind == "said":
        said = token.replace("_", r"\_")
        return rf"\text{{{said}}}" if said.startswith("BP") else rf"\text{{ {said}}}"
    if kind == "words" and token in _FUNCTIONS:
        return rf"\{token} "
    if kind == "words":
        return rf"\operatorname{{{token}}}" if token in _OPERATORS else rf"\text{{ {token} }}"
    return _PLAIN.get(token) or (f"{_LATEX[token]} " if token in _LATEX else token)
