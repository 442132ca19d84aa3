"""The versions of every code base that the drop-ins were written for: which functions are accepted.

For each function its fingerprints (_fingerprint.py), and the commits of the upstream repository between which it has
them, both included; the second is the newest that was looked at where it says "..".
tests/upstream_fingerprints.py prints these rows from a clone.
"""

from __future__ import annotations

KNOWN: dict[str, dict[str, dict[str, str]]] = {
    "NVlabs/FastGen": {
        "fastgen.methods.common_loss.variational_score_distillation_loss": {"0fccd455fa1a06b3": "51cb1be..123e6a2"},
        "fastgen.methods.distribution_matching.f_distill.FdistillModel._get_f_div_weighting_h": {
            "a3ac1242daccd700": "51cb1be..123e6a2",
        },
    },
    "tianweiy/DMD2": {
        "main.sd_guidance.SDGuidance.compute_distribution_matching_loss": {"62014cc797d7c9ca": "4e54501..8d8fa55"},
        "main.sd_guidance.predict_noise": {"636ee14103d75459": "4e54501..8d8fa55"},
        "main.sd_guidance.get_x0_from_noise": {"2696df8823f08fed": "4e54501..8d8fa55"},
        "main.edm.edm_guidance.EDMGuidance.compute_distribution_matching_loss": {
            "f2bb0d57a0249bfb": "4e54501..8d8fa55",
        },
    },
    "tianweiy/CausVid": {
        "causvid.dmd.DMD._compute_kl_grad": {"222474ea0bbdfb75": "fd4026c..ca21150"},
        "causvid.dmd.DMD.compute_distribution_matching_loss": {"2fbb76f97bcd66c9": "fd4026c..ca21150"},
    },
    "guandeh17/Self-Forcing": {
        "model.dmd.DMD._compute_kl_grad": {"acdc65d38762d343": "de36675..33593df"},
        "model.dmd.DMD.compute_distribution_matching_loss": {"8ac08cf96dada436": "de36675..33593df"},
        "model.causvid.CausVid._compute_kl_grad": {"acdc65d38762d343": "de36675..33593df"},
        "model.causvid.CausVid.compute_distribution_matching_loss": {"5b6115ee1fa998b7": "de36675..33593df"},
        "model.sid.SiD.compute_distribution_matching_loss": {"a1b663cbe312e162": "de36675..33593df"},
    },
    "mingyuanzhou/SiD": {
        "training.sid_loss.SID_EDMLoss.generator_loss": {"83efc870278e832d": "cc1a31d9..01fbb13c"},
    },
    "hao-ai-lab/FastVideo": {
        "fastvideo.train.methods.distribution_matching.dmd2.DMD2Method._dmd_loss": {
            "2490ebcb97d1d881": "bc27a032c..5854aec2c, v0.2.0",
            "d03b3db19833233f": "9709b7513..2f3d40740",
        },
        "fastvideo.train.methods.distribution_matching.self_forcing.SelfForcingMethod._dmd_loss": {
            "f3206270a56c83da": "bc27a032c..2f3d40740, v0.2.0",
        },
        "fastvideo.training.distillation_pipeline.DistillationPipeline._dmd_forward": {
            "96b9e9b9bc1fcd63": "7a4fe9086..2f3d40740, v0.1.7, v0.2.0",
        },
    },
}

# FastGen's own weightings (all_f_div_weighting_function of f_distill.py, 51cb1be..123e6a2) by fingerprint, as
# divergences of ours. It leaves constant factors out of some, and so does the alpha family.
FASTGEN_WEIGHTINGS = {
    "87948ec4ec614f86": "reverse_kl",
    "5169a47cc3262a73": "forward_kl",
    "ce25ea248ace662a": "jensen_shannon",
    "7d7d5b45e93a8322": "softened_reverse_kl",
    "86b63e615d737460": "alpha:-1",
    "b0bafa594d8a7949": "alpha:0.5",
    "ae2950eac0643ae6": "jeffreys",
}
