"""Makes epsilons.json: what Opacus's accountants say of the Poisson-subsampled Gaussian mechanism.

    pip install torch==2.13.0 opacus==1.6.0 && python make_epsilons.py

RDPAccountant bounds ε by Rényi divergences; PRVAccountant gives an upper end at most 2 · eps_error
= 0.02 above ε (its default eps_error is 0.01).
"""

import json
from pathlib import Path

from opacus.accountants import PRVAccountant, RDPAccountant

DELTA = 1e-4
MECHANISMS = ((0.25, 4.0, 240), (0.1, 1.0, 100), (0.1, 2.0, 600), (0.05, 4.0, 2000))


def main():
    rows = []
    for rate, noise, steps in MECHANISMS:
        row = {"rate": rate, "noise": noise, "steps": steps, "delta": DELTA}
        for name, accountant in (("rdp", RDPAccountant()), ("prv", PRVAccountant())):
            accountant.history = [(noise, rate, steps)]
            row[name] = accountant.get_epsilon(DELTA)
        rows.append(row)
    path = Path(__file__).parent / "epsilons.json"
    path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
