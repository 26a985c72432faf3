"""Pictures by name in a folder."""

from pathlib import Path

from components.errors import BadSample, RecipeError


class Folder:
    """Names of pictures in, their bytes out; the folder is checked to exist before anything starts.

    Args:
        path: The folder that names are relative to.
        annotations: The file that names them, for error messages.
        follow_links: Whether links may lead out of the folder.

    Raises:
        RecipeError: There is no such folder.
    """

    def __init__(self, path: str, annotations: str, follow_links: bool) -> None:
        self.path = Path(path)
        self.follow_links = follow_links
        if not self.path.is_dir():
            raise RecipeError(
                f"The image folder {path} of {annotations} does not exist (key images). "
                "Give the folder that the picture names in the annotations are relative to."
            )

    def read(self, name: str) -> bytes:
        """The bytes of a picture.

        Raises:
            BadSample: It cannot be read.
        """
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise BadSample(
                f"picture {self.path / name} cannot be read ({error.strerror}). Restore it or remove the sample."
            ) from error
