"""ArrayRecord files: how they are opened here, and how many records they hold."""

from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader

RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"  # how an ArrayRecord file is opened here


def count_records(path: Path) -> int:
    """Returns the number of records in an ArrayRecord file; a cut or broken one counts 0."""
    try:
        reader = ArrayRecordReader(str(path), RANDOM_ACCESS)
        count = reader.num_records()
        reader.close()
    except RuntimeError:
        return 0
    return count
