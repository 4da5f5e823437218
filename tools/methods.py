"""Every method in one table: its name, its script with flags, and what it knows about the context.

runs.sh, plan.py, report.py, bench.py and the tests read it. To add a method, add a row.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    name: str  # in the names of runs, and in runs.sh: METHODS="DR DMAstar-SH"
    script: str  # path from the project's root
    flags: str = ""
    window: bool = False  # infers the context from its last transitions?
    told: bool = False  # is given the true context?
    extra: bool = False  # an ablation, a variant or a relative: not part of the paper's main table

    @property
    def label(self):
        """The name as the paper writes it."""
        return self.name.replace("DMAstar", "DMA*")


METHODS = {
    method.name: method
    for method in (
        Method("DR", "dr_sac.py"),
        Method("Concat", "dr_sac.py", "--context-aware", told=True),
        Method("DA", "da_sac.py", told=True),
        Method("DMA", "dma_sac.py", "--mask-prob 0 --no-normalise", window=True),
        Method("DMA-Pearl", "dma_sac.py", "--kl-beta 0.4", window=True),
        Method("DMAstar", "dma_sac.py", window=True),
        Method("DMAstar-SH", "dmash_sac.py", window=True),
        # Not in the paper: they stand where it has Amago
        Method("RSAC", "rsac.py", window=True, extra=True),
        Method("RSAC-H", "rsac.py", "--hypernetwork", window=True, extra=True),
        Method("RSAC-H-biasinit", "rsac.py", "--hypernetwork --bias-init", window=True, extra=True),
        # Variants and ablations
        Method("Concat-scaled", "dr_sac.py", "--context-aware --scale-context", told=True, extra=True),
        Method("DA-scaled", "da_sac.py", "--scale-context", told=True, extra=True),
        Method("DMAstar-nomask", "dma_sac.py", "--mask-prob 0", window=True, extra=True),
        Method("DMAstar-nonorm", "dma_sac.py", "--no-normalise", window=True, extra=True),
        Method("DMAstar-H", "dmah_sac.py", window=True, extra=True),
        Method("DMAstar-H-RLonly", "dmah_sac.py", "--rl-only", window=True, extra=True),
        Method("DMA-SH", "dmash_sac.py", "--mask-prob 0 --no-normalise", window=True, extra=True),
        Method("DMAstar-SH-nomask", "dmash_sac.py", "--mask-prob 0", window=True, extra=True),
        Method("DMAstar-SH-nonorm", "dmash_sac.py", "--no-normalise", window=True, extra=True),
        Method("DMAstar-SH-nodetach-critic", "dmash_sac.py", "--no-detach-critic", window=True, extra=True),
        Method("DMAstar-SH-nodetach-actor", "dmash_sac.py", "--no-detach-actor", window=True, extra=True),
        Method(
            "DMAstar-SH-nodetach-critic-nodetach-actor",
            "dmash_sac.py",
            "--no-detach-critic --no-detach-actor",
            window=True,
            extra=True,
        ),
        # Relatives
        Method("HyperZero", "relatives/hyperzero.py", told=True, extra=True),
        Method("HyperZero-noQ", "relatives/hyperzero.py", "--no-q --no-td", told=True, extra=True),
        Method("HyperZero-noTD", "relatives/hyperzero.py", "--no-td", told=True, extra=True),
        Method("MLP", "relatives/hyperzero.py", "--model mlp --no-q --no-td", told=True, extra=True),
        Method("UVFA", "relatives/hyperzero.py", "--model mlp", told=True, extra=True),
        Method("HyperDynamics", "relatives/hyperdynamics.py", window=True, extra=True),
        Method("HyperDynamics-global", "relatives/hyperdynamics.py", "--model global", extra=True),
        Method("HyperDynamics-concat", "relatives/hyperdynamics.py", "--model concat", window=True, extra=True),
        Method("HyperDynamics-recurrent", "relatives/hyperdynamics.py", "--model recurrent", window=True, extra=True),
        Method("HyperDynamics-expert", "relatives/hyperdynamics.py", "--model expert", told=True, extra=True),
        # What the authors' public code does otherwise
        Method("DMAstar-SH-public", "relatives/dmash_public.py", window=True, extra=True),
        Method(
            "DMAstar-SH-unchunked",
            "relatives/dmash_public.py",
            "--no-public-steps --unchunked",
            window=True,
            extra=True,
        ),
        Method("DMAstar-SH-public-unchunked", "relatives/dmash_public.py", "--unchunked", window=True, extra=True),
    )
}
