"""Draw in the browser: --model (a run, an export, a base model) as a page on 127.0.0.1, teacher and student side by side.

Of a run the page offers the base model, every finished student, and the newest checkpoint of the stage that trains. Nothing
leaves this machine. Ctrl-C ends it.

    python -m proreflow_jax.serve --model=runs/emoji
"""

from proreflow_jax.run import cli


def serve(*, model: str, beside: str, port: int, dtype: str, revision: str, like: str, vae: str) -> None:
    """The verb: opens the models, then the page, until Ctrl-C. Raises UserError, one line."""
    from proreflow_jax.jobs.gallery import open_gallery
    from proreflow_jax.jobs.gallery_page import check_page, show

    check_page(port)
    show(open_gallery(model, beside, dtype=dtype, revision=revision, like=like, vae=vae), port)


if __name__ == "__main__":
    options = {
        "model": ("", "a run or one of its stages, an export, a diffusers folder, a .safetensors file, or a hub id"),
        "beside": ("", "another model to draw beside it, as the base of an export; a run has its own"),
        "port": (7860, "of 127.0.0.1, where the page is", (1, 65535)),
        "dtype": ("", "of the computation: float32 or bfloat16; empty: as a run's config says, else float32"),
        "revision": ("main", "of a hub id: branch, tag or commit"),
        "like": ("", "of a single file: folder or hub id with configs and tokenizer; empty: its family's own"),
        "vae": ("", "another VAE for --model; empty: the model's own"),
    }
    cli.start(serve, __doc__, "", options)
