"""RecBole's LightGCN on a given split: run by a Python that has RecBole, with a folder and options as JSON.

    PYTHON_WITH_RECBOLE recbole_lightgcn.py FOLDER '{"epochs": 10, ...}'

FOLDER holds pairs.train.inter, pairs.valid.inter and pairs.test.inter. Left there: users.npy, items.npy (the embeddings that
are scored, float32) and users.json, items.json (the tokens of their rows, the first of which is padding). The last line of
stdout is the seconds of each epoch, in JSON. It imports nothing of this project.
"""

import json
import sys
import time
from pathlib import Path


def main(folder: Path, options: dict) -> None:
    import numpy as np
    import torch
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.general_recommender.lightgcn import LightGCN
    from recbole.trainer import Trainer
    from recbole.utils import init_seed

    torch.set_num_threads(options["threads"])
    config = Config(
        model="LightGCN",
        dataset="pairs",
        config_dict={
            "data_path": str(folder.parent),
            "benchmark_filename": ["train", "valid", "test"],
            "load_col": {"inter": ["user_id", "item_id"]},
            "embedding_size": options["dimension"],
            "n_layers": options["layers"],
            "learning_rate": options["learning_rate"],
            "reg_weight": options["weight_decay"],
            "train_batch_size": options["batch_size"],
            "epochs": options["epochs"],
            "seed": options["seed"],
            "use_gpu": False,
            "show_progress": False,
            "state": "ERROR",
            "checkpoint_dir": str(folder),
        },
    )
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    training, _, _ = data_preparation(config, dataset)
    model = LightGCN(config, training.dataset)
    trainer = Trainer(config, model)
    seconds = []
    for epoch in range(options["epochs"]):
        begun = time.perf_counter()
        trainer._train_epoch(training, epoch)
        seconds.append(time.perf_counter() - begun)
    model.eval()
    with torch.no_grad():
        users, items = model.forward()
    for name, field, vectors in (("users", "user_id", users), ("items", "item_id", items)):
        np.save(folder / f"{name}.npy", vectors.numpy().astype(np.float32))
        tokens = dataset.id2token(field, np.arange(len(vectors)))
        (folder / f"{name}.json").write_text(json.dumps([str(token) for token in tokens]))
    print(json.dumps(seconds))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
