"""Key slots of LUKS images: adding one and erasing some, by amend, while the image is open and drained.

A slot is active only once all that it needs is durable, and an erased one is inactive, durably, before its key material is
overwritten; so a crash leaves the slots as they were, or as they were to become, and never one that lies.  Only where force
puts a new key into a slot that is active, a crash can leave that slot inactive.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from blocklib.crypto import luks
from blocklib.crypto.secrets import Secret
from blocklib.errors import OptionError
from blocklib.formats.qcow2 import layout
from blocklib.formats.qcow2.encryption import header_area, read_area, read_luks, seconds_for

if TYPE_CHECKING:
    from blocklib.formats.qcow2.node import Qcow2Node

_OPTIONS = ("encrypt.state", "encrypt.new-secret", "encrypt.old-secret", "encrypt.keyslot", "encrypt.iter-time")
_STATE_LENGTH = 4


class Change(NamedTuple):
    """What is to become of the key slots: a new one, or the slots to erase."""

    new_slot: int | None
    erased: Sequence[int]


def plan(node: Qcow2Node, options: Mapping[str, Any], *, force: bool) -> Change | None:
    """What checked amend `options` mean for this image; None where they say nothing of its encryption.

    Raises OptionError for what makes no sense, and for what would lose data unless `force` is given.
    """
    given = {name.removeprefix("encrypt."): options[name] for name in _OPTIONS if options[name] is not None}
    if not given:
        return None
    if node.header.crypt_method != layout.CRYPT_LUKS:
        found = "is not encrypted" if node.header.crypt_method == layout.CRYPT_NONE else "has no key slots"
        raise _bad(node, "state", f"only LUKS has options of encryption to amend, and the image {found}")
    for name in ("new-secret", "old-secret"):
        if name in given and not isinstance(given[name], Secret):
            raise _bad(node, name, f"encrypt.{name} is a blocklib.Secret (on the command line: the id of an --object secret)")
    if "state" not in given:
        raise _bad(node, "state", "encrypt.state says whether a key slot becomes active or inactive, and is missing")
    slots = read_luks(node).slots
    if given["state"] == "active":
        _refuse(node, given, "old-secret", "a key slot becomes active")
        if "new-secret" not in given:
            raise _bad(node, "new-secret", "encrypt.new-secret is needed for a key slot to become active")
        return Change(_slot_to_fill(node, slots, given.get("keyslot"), force), ())
    for name in ("new-secret", "iter-time"):
        _refuse(node, given, name, "key slots are erased")
    return Change(None, _slots_to_erase(node, slots, given.get("keyslot"), given.get("old-secret"), force))


def _bad(node: Qcow2Node, name: str, text: str) -> OptionError:
    return OptionError(f"{node.filename}: {text}", option=f"encrypt.{name}", driver="qcow2", node=node.filename)


def _refuse(node: Qcow2Node, given: Mapping[str, Any], name: str, when: str) -> None:
    if name in given:
        raise _bad(node, name, f"encrypt.{name} has no meaning when {when}")


def _slot_to_fill(node: Qcow2Node, slots: Sequence[luks.KeySlot], wanted: int | None, force: bool) -> int:
    if wanted is None:
        free = next((index for index, slot in enumerate(slots) if not slot.active), None)
        if free is None:
            raise _bad(node, "keyslot", "all key slots are in use: erase one first")
        return free
    if slots[wanted].active and not force:
        raise _bad(node, "keyslot", f"key slot {wanted} is in use: erase it first")
    return wanted


def _slots_to_erase(
    node: Qcow2Node, slots: Sequence[luks.KeySlot], wanted: int | None, old: Secret | None, force: bool
) -> Sequence[int]:
    if wanted is None and old is None:
        raise _bad(node, "keyslot", "what is erased is said by encrypt.keyslot, encrypt.old-secret or both")
    active = [index for index, slot in enumerate(slots) if slot.active]
    if wanted is not None and wanted not in active:
        raise _bad(node, "keyslot", f"key slot {wanted} is not in use")
    chosen = active if wanted is None else [wanted]
    if old is not None:
        chosen = [index for index in chosen if _opened(node, old, only=index) is not None]
        if not chosen:
            where = "no key slot" if wanted is None else f"key slot {wanted} is not one that"
            raise _bad(node, "old-secret", f"{where} the old secret opens")
    if len(chosen) == len(active) and not force:
        raise _bad(node, "keyslot", "that would erase the last key slot, and with it all data for good (--force does it)")
    return chosen


def _opened(node: Qcow2Node, secret: Secret, *, only: int | None = None) -> tuple[int, bytes] | None:
    return luks.unlock(
        read_luks(node), secret.reveal(), lambda offset, length: read_area(node, offset, length), only=only
    )


def change(node: Qcow2Node, options: Mapping[str, Any], planned: Change) -> None:
    """Do what `plan` has found; durable on return."""
    if planned.new_slot is not None:
        add_key(node, options["encrypt.new-secret"], planned.new_slot, seconds=seconds_for(options))
    for slot in planned.erased:
        erase_key(node, slot)


def add_key(node: Qcow2Node, secret: Secret, slot: int, *, seconds: float) -> None:
    """Let `secret` open the image by key slot `slot`, which opening takes about `seconds` for.

    What the slot held is lost.  Raises OptionError where the secret that the node was opened with opens it no more.
    """
    own = node.options.get("encrypt.key-secret")
    opened = _opened(node, own) if isinstance(own, Secret) else None
    if opened is None:
        raise _bad(node, "key-secret", "the secret that the image was opened with opens it no more")
    _slot, master_key = opened
    header = read_luks(node)
    material = luks.fill_slot(header, slot, master_key, secret.reveal(), seconds=seconds)
    filled = header.slots[slot].pack()
    with node.writeback.structure:
        _write_state(node, slot, luks.SLOT_INACTIVE)
        _write(node, header.slots[slot].key_offset, material)
        _write(node, luks.slot_field_offset(slot) + _STATE_LENGTH, filled[_STATE_LENGTH:])
        node.writeback.barrier()
        _write(node, luks.slot_field_offset(slot), filled[:_STATE_LENGTH])
        node.writeback.barrier()


def erase_key(node: Qcow2Node, slot: int) -> None:
    """Make key slot `slot` open nothing any more, whatever it is, and overwrite its key material."""
    header = read_luks(node)
    with node.writeback.structure:
        _write_state(node, slot, luks.SLOT_INACTIVE)
        # Iterations and salt go, the place of the material stays.
        _write(node, luks.slot_field_offset(slot) + _STATE_LENGTH, bytes(_STATE_LENGTH + luks.SALT_LENGTH))
        _write(node, header.slots[slot].key_offset, os.urandom(header.material_length))
        node.writeback.barrier()


def _write_state(node: Qcow2Node, slot: int, state: int) -> None:
    _write(node, luks.slot_field_offset(slot), state.to_bytes(_STATE_LENGTH, "big"))
    node.writeback.barrier()


def _write(node: Qcow2Node, offset: int, data: bytes) -> None:
    node.file.write(header_area(node.header)[0] + offset, (data,), "metadata")
