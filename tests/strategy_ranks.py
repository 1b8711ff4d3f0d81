"""Run fits one after another on this rank: rank, port, project, cases (name: options) as JSON. For test_strategies."""

import json
import os
import sys
import traceback


def main() -> None:
    rank, port, project, cases = sys.argv[1:]
    if port != "0":
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, LOCAL_RANK=rank)
    os.chdir(project)
    import infctx.recipe
    import infctx.training
    from infctx.cli import main as command

    infctx.recipe.write_report = lambda folder: folder  # a second each
    load = infctx.training.load_model
    for name, options in json.loads(cases).items():

        def load_frozen(*args, frozen="frozen" in name, **given):
            model = load(*args, **given)
            for key, p in model.named_parameters():
                if frozen and (key.startswith(("blocks.0.att", "emb")) or key.endswith("ln_x.bias")):
                    p.requires_grad_(False)
            return model

        infctx.training.load_model = load_frozen
        sys.argv = ["infctx", "fit"]
        try:
            command(["fit", "-c", "recipe.yaml", "--debug", "--name", name, *options])
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # the other rank must not wait for this one
        print(f"done {name}", flush=True)


if __name__ == "__main__":
    main()
