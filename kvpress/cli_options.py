"""Options that several commands share, as they stand in `--help`."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import typer

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="smollm2, a local folder, a .gguf file, or a Hugging Face hub id.")
]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16, float16 or float64; left out: the checkpoint's.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
KvDtypeOption = Annotated[
    str | None,
    typer.Option(
        "--kv-dtype", help="Store keys and values as bfloat16, float16 or int8; left out: in the model's type."
    ),
]


@dataclass(frozen=True)
class Loading:
    """Which model, where, in what type."""

    panel: ClassVar[str] = "Model"

    model: ModelOption = "smollm2"
    dtype: DtypeOption = None
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda:0, …; left out: the first GPU if there is one.")
    ] = None
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; left out: torch's choice.")] = (
        None
    )

    def load(self) -> tuple[Any, Any]:
        """Set the threads, then load model and tokenizer."""
        import torch

        from kvpress.models import load_model

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return load_model(self.model, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Storage:
    """How a cache stores what it keeps."""

    panel: ClassVar[str] = "Storage of the cache"

    kv_dtype: KvDtypeOption = None
    offload_device: Annotated[
        str | None,
        typer.Option(help="Bytes of the cache that may stay in the memory of the device that computes (256MB)."),
    ] = None
    offload_host: Annotated[
        str | None, typer.Option(help="Bytes of the cache that may lie in host memory; the rest goes to disk.")
    ] = None
    offload_disk: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Where blocks go that do not fit in memory.")
    ] = None
    offload_disk_limit: Annotated[
        str | None, typer.Option(help="Bytes of these files; left out: what the file system has.")
    ] = None
    offload_block: Annotated[
        int | None, typer.Option(min=1, help="Slots that move together; left out: 256. Smaller ones need less memory.")
    ] = None

    def offload(self) -> dict[str, Any] | None:
        """Arguments of `kvpress.offload.Offload`; `None` where no tier is named.

        Raises:
            ValueError: a size that is none; names the option.
        """
        from kvpress.offload.options import Offload
        from kvpress.policies.budget import parse_bytes

        sizes = {
            name: None if text is None else parse_bytes(text, field=f"offload-{name.replace('_', '-')}")
            for name, text in (
                ("device", self.offload_device),
                ("host", self.offload_host),
                ("disk_limit", self.offload_disk_limit),
            )
        }
        asked = {**sizes, "disk": self.offload_disk, "block": self.offload_block}
        given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        if not given:
            return None
        if self.offload_disk is None and self.offload_disk_limit is not None:
            raise ValueError("offload-disk-limit needs offload-disk to be given")
        if given.keys() == {"block"}:
            raise ValueError("offload-block needs offload-device, offload-host or offload-disk to be given")
        Offload(**given)  # refuses what does not go together
        return given

    def arguments(self) -> dict[str, Any]:
        """As `PolicyCache` takes them.

        Raises:
            ValueError: an unknown type, or a size that is none.
        """
        from kvpress.offload.options import Offload
        from kvpress.row_format import row_format

        row_format(self.kv_dtype)
        offload = self.offload()
        return {"kv_dtype": self.kv_dtype, "offload": None if offload is None else Offload(**offload)}
