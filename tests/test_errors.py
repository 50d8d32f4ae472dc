"""Files that are whole or not there."""

from conftest import run_python

from qsparse_hf.errors import write_whole


def test_what_does_not_fit_leaves_what_was_there(tmp_path):
    file = tmp_path / "results.json"
    write_whole(file, "earlier")
    code = f"""
import pathlib, resource
from qsparse_hf.errors import write_whole
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # as on a full disk, the write fails in its middle
try:
    write_whole(pathlib.Path({str(file)!r}), "x" * 2000)
except OSError as error:
    print(error.strerror)
"""
    assert run_python(code).stdout == "File too large\n"
    assert file.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [file]


def test_links_and_devices_are_written_through(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "there")
    write_whole(link, "text")
    assert link.is_symlink()
    assert (tmp_path / "there").read_text() == "text"
    code = "import pathlib; from qsparse_hf.errors import write_whole; write_whole(pathlib.Path('/dev/stdout'), 'text')"
    assert run_python(code).stdout == "text"
