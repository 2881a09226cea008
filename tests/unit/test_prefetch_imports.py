"""What the helper may cost before it does anything, and where it must run: a box with torch and msgspec alone."""

from __future__ import annotations

import subprocess
import sys


def test_the_package_needs_neither_the_daemon_nor_torch() -> None:
    program = (
        "import sys\n"
        "for name in ('pyfuse3', 'trio', 'lmdb', 'boto3', 'huggingface_hub', 'typer', 'rich', 'urllib3', 'torch'):\n"
        "    sys.modules[name] = None\n"  # importing it fails
        "import instantstart_fs.prefetch, instantstart_fs.prefetch.worker, instantstart_fs.prefetch.tensors\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_without_torch_a_clear_error_says_what_to_install() -> None:
    program = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from instantstart_fs.errors import PrefetchError\n"
        "from instantstart_fs.prefetch.libtorch import load_torch\n"
        "try:\n"
        "    load_torch()\n"
        "except PrefetchError as error:\n"
        "    print(error.message)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert "instantstart-fs[gpu]" in done.stdout
