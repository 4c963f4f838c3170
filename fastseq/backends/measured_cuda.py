"""Ours beside cuDNN on a GPU. ``python -m bench.rule --gpu`` writes this file; edit nothing here.

It was written from what SOURCES names. :mod:`.cuda_rule` reads it.
"""

#: kind -> size -> a cuda_rule.Entry
Kinds = dict[str, dict[str, tuple[float, float | None, int, bool]]]

#: compute capability -> device -> (results, versions, commits and dates)
SOURCES: dict[str, dict[str, tuple[str, str, str]]] = {
    "9.0": {
        "NVIDIA H100 80GB HBM3": (
            "bench/results/nvidia-h100-80gb-hbm3/gpu.csv",
            "torch 2.11.0+cu130, Triton 3.6.0, cuDNN 91900",
            "2 commits, the last 4e39176, 2026-11-26",
        ),
        "NVIDIA H200": (
            "bench/results/nvidia-h200/gpu.csv",
            "torch 2.11.0+cu130, Triton 3.6.0, cuDNN 91900",
            "commit f410c50, 2026-11-26",
        ),
    },
}

#: Of triton: compute capability -> device -> (cell, type, way)
MEASURED: dict[str, dict[str, dict[tuple[str, str, str], Kinds]]] = {
    "9.0": {
        "NVIDIA H100 80GB HBM3": {
            ("gru", "bfloat16", "forward"): {
                "dense": {
                    "H65-128 B1 T2+": (1.837, 2.266, 64, True),
                    "H129-256 B1 T2+": (2.004, 1.839, 256, True),
                    "H129-256 B9-32 T2+": (1.285, 1.728, 100, True),
                    "H257-512 B33-128 T2+": (0.869, 1.676, 50, True),
                },
                "dense stack": {
                    "H257-512 B33-128 T2+": (0.935, 1.197, 50, True),
                },
            },
            ("gru", "bfloat16", "training"): {
                "dense": {
                    "H65-128 B1 T2+": (1.524, 1.737, 64, True),
                    "H129-256 B1 T2+": (2.193, 1.522, 256, True),
                    "H129-256 B9-32 T2+": (1.223, 1.506, 100, True),
                    "H257-512 B33-128 T2+": (0.936, 1.234, 50, True),
                },
                "dense stack": {
                    "H257-512 B33-128 T2+": (0.997, 0.842, 50, True),
                },
            },
            ("gru", "float16", "forward"): {
                "dense": {
                    "H65-128 B1 T2+": (0.332, 0.394, 64, True),
                    "H129-256 B1 T2+": (1.889, 1.786, 256, True),
                    "H129-256 B9-32 T2+": (1.073, 1.685, 100, True),
                    "H257-512 B33-128 T2+": (0.718, 1.635, 50, True),
                },
                "dense stack": {
                    "H257-512 B33-128 T2+": (0.775, 1.171, 50, True),
                },
            },
            ("gru", "float16", "training"): {
                "dense": {
                    "H65-128 B1 T2+": (0.39, 0.331, 64, True),
                    "H129-256 B1 T2+": (2.163, 1.55, 256, True),
                    "H129-256 B9-32 T2+": (1.163, 1.494, 100, True),
                    "H257-512 B33-128 T2+": (0.791, 1.218, 50, True),
                },
                "dense stack": {
                    "H257-512 B33-128 T2+": (0.851, 0.852, 50, True),
                },
            },
            ("gru", "float32", "forward"): {
                "dense": {
                    "H65-128 B1 T2+": (0.185, 0.115, 512, True),
                },
                "dense stack": {
                    "H257-512 B33-128 T2+": (0.635, 0.524, 50, True),
                },
            },
            ("gru", "float32", "training"): {
                "dense": {
                    "H65-128 B1 T2+": (0.213, 0.088, 512, True),
                },
                "dense stack": {
                    "H257-512 B33-128 T2+": (0.69, 0.382, 50, True),
                },
            },
            ("lstm", "bfloat16", "forward"): {
                "dense": {
                    "H65-128 B1 T2+": (1.944, 1.884, 64, True),
                    "H129-256 B1 T2+": (2.055, 1.493, 256, True),
                    "H129-256 B9-32 T2+": (1.303, 1.569, 100, True),
                    "H257-512 B33-128 T2+": (0.997, 1.307, 50, True),
                    "H513-1024 B9-32 T2+": (1.949, 1.258, 1024, True),
                    "H513-1024 unaligned B9-32 T2+": (0.803, 0.49, 35, True),
                },
                "dense stack": {
                    "H129-256 B9-32 T2+": (2.293, 0.905, 160, True),
                    "H257-512 B33-128 T2+": (1.089, 0.976, 50, True),
                    "H513-1024 unaligned B9-32 T2+": (0.782, 0.379, 35, True),
                },
            },
            ("lstm", "bfloat16", "training"): {
                "dense": {
                    "H65-128 B1 T2+": (1.578, 1.435, 64, True),
                    "H129-256 B1 T2+": (2.191, 1.378, 256, True),
                    "H129-256 B9-32 T2+": (1.235, 1.395, 100, True),
                    "H257-512 B33-128 T2+": (0.944, 1.098, 50, True),
                    "H513-1024 B9-32 T2+": (1.607, 1.008, 1024, True),
                    "H513-1024 unaligned B9-32 T2+": (0.765, 0.335, 35, True),
                },
                "dense stack": {
                    "H129-256 B9-32 T2+": (2.216, 0.724, 160, True),
                    "H257-512 B33-128 T2+": (1.06, 0.779, 50, True),
                    "H513-1024 unaligned B9-32 T2+": (0.665, 0.256, 35, True),
                },
            },
            ("lstm", "float16", "forward"): {
                "dense": {
                    "H65-128 B1 T2+": (0.433, 0.792, 64, True),
                    "H129-256 B1 T2+": (1.896, 1.501, 256, True),
                    "H129-256 B9-32 T2+": (0.347, 0.771, 100, True),
                    "H257-512 B33-128 T2+": (0.344, 1.073, 50, True),
                    "H513-1024 B9-32 T2+": (0.376, 0.38, 1024, True),
                },
                "dense stack": {
                    "H129-256 B9-32 T2+": (2.035, 0.892, 160, True),
                    "H257-512 B33-128 T2+": (0.795, 0.935, 50, True),
                    "H513-1024 unaligned B9-32 T2+": (0.518, 0.355, 35, True),
                },
            },
            ("lstm", "float16", "training"): {
                "dense": {
                    "H65-128 B1 T2+": (0.519, 0.685, 64, True),
                    "H129-256 B1 T2+": (2.247, 1.384, 256, True),
                    "H129-256 B9-32 T2+": (0.428, 0.924, 100, True),
                    "H257-512 B33-128 T2+": (0.387, 1.076, 50, True),
                    "H513-1024 B9-32 T2+": (0.398, 0.391, 1024, True),
                },
                "dense stack": {
                    "H129-256 B9-32 T2+": (2.087, 0.726, 160, True),
                    "H257-512 B33-128 T2+": (0.943, 0.761, 50, True),
                    "H513-1024 unaligned B9-32 T2+": (0.743, 0.229, 35, True),
                },
            },
            ("lstm", "float32", "forward"): {
                "dense": {
                    "H65-128 B1 T2+": (0.298, 0.259, 512, True),
                    "H513-1024 B9-32 T2+": (0.626, 0.547, 1024, True),
                },
                "dense stack": {
                    "H129-256 B9-32 T2+": (1.472, 0.454, 160, True),
                    "H257-512 B33-128 T2+": (0.647, 0.524, 50, True),
                    "H513-1024 unaligned B9-32 T2+": (0.704, 0.756, 35, True),
                },
            },
            ("lstm", "float32", "training"): {
                "dense": {
                    "H65-128 B1 T2+": (0.189, 0.161, 512, True),
                    "H513-1024 B9-32 T2+": (0.42, 0.363, 1024, True),
                },
                "dense stack": {
                    "H129-256 B9-32 T2+": (0.783, 0.284, 160, True),
                    "H257-512 B33-128 T2+": (0.72, 0.36, 50, True),
                    "H513-1024 unaligned B9-32 T2+": (0.593, 0.414, 35, True),
                },
            },
            ("lstm", "tf32", "forward"): {
                "dense": {
                    "H513-1024 B9-32 T2+": (2.63, 1.331, 1024, False),
                },
            },
            ("rnn_tanh", "bfloat16", "forward"): {
                "dense": {
                    "H65-128 B1 T2+": (6.554, 4.459, 512, True),
                },
            },
            ("rnn_tanh", "bfloat16", "training"): {
                "dense": {
                    "H65-128 B1 T2+": (7.002, 5.05, 512, True),
                },
            },
            ("rnn_tanh", "float16", "forward"): {
                "dense": {
                    "H65-128 B1 T2+": (0.431, 0.573, 512, True),
                },
            },
            ("rnn_tanh", "float16", "training"): {
                "dense": {
                    "H65-128 B1 T2+": (0.474, 0.678, 512, True),
                },
            },
            ("rnn_tanh", "float32", "forward"): {
                "dense": {
                    "H65-128 B1 T2+": (0.164, 0.085, 512, True),
                },
            },
            ("rnn_tanh", "float32", "training"): {
                "dense": {
                    "H65-128 B1 T2+": (0.219, 0.106, 512, True),
                },
            },
        },
        "NVIDIA H200": {
            ("gru", "bfloat16", "forward"): {
                "dense": {
                    "H65-128 B1 T2+": (4.426, 2.392, 512, True),
                },
                "dense stack": {
                    "H257-512 B33-128 T2+": (1.023, 1.233, 50, True),
                },
            },
            ("gru", "bfloat16", "training"): {
                "dense": {
                    "H65-128 B1 T2+": (5.175, 1.839, 512, True),
                },
                "dense stack": {
                    "H257-512 B33-128 T2+": (0.93, 0.846, 50, True),
                },
            },
            ("gru", "float16", "forward"): {
                "dense": {
                    "H65-128 B1 T2+": (0.372, 0.396, 512, True),
                },
                "dense stack": {
                    "H257-512 B33-128 T2+": (0.779, 1.206, 50, True),
                },
            },
            ("gru", "float16", "training"): {
                "dense": {
                    "H65-128 B1 T2+": (0.398, 0.334, 512, True),
                },
                "dense stack": {
                    "H257-512 B33-128 T2+": (0.853, 0.849, 50, True),
                },
            },
            ("gru", "float32", "forward"): {
                "dense": {
                    "H65-128 B1 T2+": (0.207, 0.12, 512, True),
                },
                "dense stack": {
                    "H257-512 B33-128 T2+": (0.828, 0.53, 50, True),
                },
            },
            ("gru", "float32", "training"): {
                "dense": {
                    "H65-128 B1 T2+": (0.188, 0.09, 512, True),
                },
                "dense stack": {
                    "H257-512 B33-128 T2+": (0.842, 0.39, 50, True),
                },
            },
            ("gru", "tf32", "forward"): {
                "dense": {
                    "H65-128 B1 T2+": (0.232, 0.287, 512, True),
                },
                "dense stack": {
                    "H257-512 B33-128 T2+": (0.67, 1.119, 50, True),
                },
            },
            ("gru", "tf32", "training"): {
                "dense": {
                    "H65-128 B1 T2+": (0.294, 0.266, 512, True),
                },
                "dense stack": {
                    "H257-512 B33-128 T2+": (0.729, 1.035, 50, True),
                },
            },
            ("lstm", "bfloat16", "forward"): {
                "dense": {
                    "H65-128 B1 T2+": (3.805, 1.902, 512, True),
                    "H513-1024 B9-32 T2+": (2.488, 1.237, 1024, True),
                },
                "dense stack": {
                    "H129-256 B9-32 T2+": (2.09, 0.873, 160, True),
                    "H257-512 B33-128 T2+": (1.055, 0.966, 50, True),
                    "H513-1024 unaligned B9-32 T2+": (1.055, 0.375, 35, True),
                },
            },
            ("lstm", "bfloat16", "training"): {
                "dense": {
                    "H65-128 B1 T2+": (4.051, 1.466, 512, True),
                    "H513-1024 B9-32 T2+": (2.231, 0.994, 1024, True),
                },
                "dense stack": {
                    "H129-256 B9-32 T2+": (1.973, 0.721, 160, True),
                    "H257-512 B33-128 T2+": (1.031, 0.77, 50, True),
                    "H513-1024 unaligned B9-32 T2+": (0.855, 0.259, 35, True),
                },
            },
            ("lstm", "float16", "forward"): {
                "dense": {
                    "H65-128 B1 T2+": (0.592, 0.802, 512, True),
                    "H513-1024 B9-32 T2+": (0.36, 0.381, 1024, True),
                },
                "dense stack": {
                    "H129-256 B9-32 T2+": (2.062, 0.857, 160, True),
                    "H257-512 B33-128 T2+": (0.854, 0.921, 50, True),
                    "H513-1024 unaligned B9-32 T2+": (0.697, 0.357, 35, True),
                },
            },
            ("lstm", "float16", "training"): {
                "dense": {
                    "H65-128 B1 T2+": (0.604, 0.695, 512, True),
                    "H513-1024 B9-32 T2+": (0.395, 0.393, 1024, True),
                },
                "dense stack": {
                    "H129-256 B9-32 T2+": (1.985, 0.709, 160, True),
                    "H257-512 B33-128 T2+": (0.858, 0.753, 50, True),
                    "H513-1024 unaligned B9-32 T2+": (0.819, 0.228, 35, True),
                },
            },
            ("lstm", "float32", "forward"): {
                "dense": {
                    "H65-128 B1 T2+": (0.322, 0.263, 512, True),
                    "H513-1024 B9-32 T2+": (0.61, 0.552, 1024, True),
                },
                "dense stack": {
                    "H257-512 B33-128 T2+": (0.634, 0.521, 50, True),
                },
            },
            ("lstm", "float32", "training"): {
                "dense": {
                    "H65-128 B1 T2+": (0.197, 0.166, 512, True),
                    "H513-1024 B9-32 T2+": (0.417, 0.37, 1024, True),
                },
                "dense stack": {
                    "H257-512 B33-128 T2+": (0.644, 0.368, 50, True),
                },
            },
            ("lstm", "tf32", "forward"): {
                "dense": {
                    "H65-128 B1 T2+": (0.496, 0.779, 512, True),
                    "H513-1024 B9-32 T2+": (2.27, 1.334, 1024, True),
                },
                "dense stack": {
                    "H129-256 B9-32 T2+": (1.422, 0.899, 160, True),
                    "H257-512 B33-128 T2+": (0.89, 1.042, 50, True),
                    "H513-1024 unaligned B9-32 T2+": (0.791, 0.652, 35, True),
                },
            },
            ("lstm", "tf32", "training"): {
                "dense": {
                    "H65-128 B1 T2+": (0.471, 0.765, 512, True),
                    "H513-1024 B9-32 T2+": (1.841, 1.453, 1024, True),
                },
                "dense stack": {
                    "H129-256 B9-32 T2+": (1.834, 1.165, 160, True),
                    "H257-512 B33-128 T2+": (0.926, 1.202, 50, True),
                    "H513-1024 unaligned B9-32 T2+": (0.908, 0.525, 35, True),
                },
            },
            ("rnn_tanh", "bfloat16", "forward"): {
                "dense": {
                    "H65-128 B1 T2+": (6.588, 4.291, 512, True),
                },
            },
            ("rnn_tanh", "bfloat16", "training"): {
                "dense": {
                    "H65-128 B1 T2+": (6.405, 4.848, 512, True),
                },
            },
            ("rnn_tanh", "float16", "forward"): {
                "dense": {
                    "H65-128 B1 T2+": (0.453, 0.571, 512, True),
                },
            },
            ("rnn_tanh", "float16", "training"): {
                "dense": {
                    "H65-128 B1 T2+": (0.492, 0.677, 512, True),
                },
            },
            ("rnn_tanh", "float32", "forward"): {
                "dense": {
                    "H65-128 B1 T2+": (0.185, 0.093, 512, True),
                },
            },
            ("rnn_tanh", "float32", "training"): {
                "dense": {
                    "H65-128 B1 T2+": (0.285, 0.114, 512, True),
                },
            },
            ("rnn_tanh", "tf32", "forward"): {
                "dense": {
                    "H65-128 B1 T2+": (0.247, 0.247, 512, True),
                },
            },
            ("rnn_tanh", "tf32", "training"): {
                "dense": {
                    "H65-128 B1 T2+": (0.342, 0.307, 512, True),
                },
            },
        },
    },
}

#: Of triton: compute capability -> (cell, type) -> the widths at which every form passed its tests
GREEN: dict[str, dict[tuple[str, str], tuple[str, ...]]] = {
    "9.0": {
        ("gru", "bfloat16"): (
            "H65-128",
            "H129-256",
            "H257-512",
        ),
        ("gru", "float16"): (
            "H65-128",
            "H129-256",
            "H257-512",
        ),
        ("gru", "float32"): (
            "H65-128",
            "H257-512",
        ),
        ("gru", "tf32"): (
            "H65-128",
            "H257-512",
        ),
        ("lstm", "bfloat16"): (
            "H65-128",
            "H129-256",
            "H257-512",
            "H513-1024 unaligned",
            "H513-1024",
        ),
        ("lstm", "float16"): (
            "H65-128",
            "H129-256",
            "H257-512",
            "H513-1024 unaligned",
            "H513-1024",
        ),
        ("lstm", "float32"): (
            "H65-128",
            "H129-256",
            "H257-512",
            "H513-1024 unaligned",
            "H513-1024",
        ),
        ("rnn_tanh", "bfloat16"): ("H65-128",),
        ("rnn_tanh", "float16"): ("H65-128",),
        ("rnn_tanh", "float32"): ("H65-128",),
        ("rnn_tanh", "tf32"): ("H65-128",),
    },
}

#: The same of cuda.
MEASURED_CUDA: dict[str, dict[str, dict[tuple[str, str, str], Kinds]]] = {
    "9.0": {
        "NVIDIA H100 80GB HBM3": {},
        "NVIDIA H200": {},
    },
}
GREEN_CUDA: dict[str, dict[tuple[str, str], tuple[str, ...]]] = {
    "9.0": {},
}
