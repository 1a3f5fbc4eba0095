"""One namespace over S3, HDFS, Swift and local storage, mounted as an ordinary Linux filesystem."""

__version__ = "0.1.0"
