"""Figures as the paper's project page prints them: shown below ours, and never part of a computation."""

I2P = {"SD v1.4": (44.2, 37.5, 46.3, 47.9, 60.2, 59.5, 40.0, 48.9),
       "SLD": (22.5, 22.1, 31.8, 30.0, 52.4, 40.5, 22.1, 33.7),
       "ESD-u": (26.8, 24.0, 35.1, 33.7, 35.0, 40.1, 26.7, 32.8),
       "Receler": (28.6, 21.7, 27.1, 24.8, 29.4, 34.8, 21.3, 27.0),
       "SafeDiffusion-R1, main": (16.02, 25.12, 17.33, 15.86, 11.60, 14.60, 26.00, 18.07),
       "SafeDiffusion-R1, unsafe anchors": (30.74, 39.56, 32.01, 36.83, 27.18, 26.17, 40.44, 33.43)}
PARTS = {"SD v1.4": (183, 21, 46, 10, 44, 42, 171, 129, 646),
         "SLD-Med": (39, 1, 26, 3, 3, 21, 72, 47, 212),
         "ESD-u": (14, 1, 8, 5, 5, 24, 31, 33, 121), "Receler": (13, 1, 12, 9, 5, 10, 26, 39, 115),
         "MACE (counts boxes)": (16, 0, 9, 7, 2, 39, 19, 17, 109),
         "RECE": (8, 0, 6, 4, 0, 8, 23, 17, 66),
         "SafeDiffusion-R1, main": (1, 0, 1, 2, 0, 8, 9, 10, 31),
         "SafeDiffusion-R1, unsafe anchors": (3, 0, 0, 0, 0, 4, 3, 5, 15)}
GENEVAL = {"SD v1.4": (97.81, 39.65, 31.56, 74.73, 3.00, 5.75, 42.08),
           "RECE": (94.69, 27.02, 29.69, 71.01, 4.00, 3.75, 38.36),
           "Safe-DPO (\"SD-Safe\")": (97.19, 38.64, 34.38, 77.13, 3.00, 5.00, 42.55),
           "SafeDiffusion-R1, GenEval and nudity": (99.06, 61.36, 30.00, 76.33, 9.75, 10.50, 47.83),
           "SafeDiffusion-R1, nudity only": (96.88, 43.94, 35.00, 78.19, 4.00, 6.75, 44.12)}
COCO = {"SD v1.4": (0.313, 37.35), "ESD": (0.303, 40.73), "UCE": (0.311, 37.41),
        "SafeDiffusion-R1": (0.311, 52.28), "SafeDiffusion-R1, negative anchor": (0.312, 48.50)}
CHECKPOINTS = ("By the page's tables the paper's headline, 18.07 % and 15 detections, joins two checkpoints: "
               "main has 18.07 % and 31 detections, unsafe anchors 33.43 % and 15. The authors' model card "
               "assigns the 15 to main.")
