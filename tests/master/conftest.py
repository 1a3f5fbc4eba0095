"""Fixtures for the tests of this folder; their types are imported from `persist_places`."""

from persist_places import local_place as local_place
from persist_places import place as place
from persist_places import s3_or_none as s3_or_none
