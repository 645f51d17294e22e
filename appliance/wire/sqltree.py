"""What a parsed PostgreSQL statement does: its verb, the relations that it names, what it prepares
or drops.

`appliance.wire.sql` hands in nodes of libpg_query's tree (protobuf messages, `pg_query.proto`);
nothing here parses text. Recursion is as deep as the tree, and a tree that protobuf could decode is
at most 100 levels deep.

A relation's name is what the text says: "schema.table" where a schema is written, "table" where the
search path decides. The name of a common table expression is no relation where that expression is
in scope; elsewhere, and as the target of INSERT, UPDATE, DELETE or MERGE, the same word is one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

UNKNOWN = "unknown"

#: Verbs that do not follow from the name of the statement's node.
_VERBS = {
    "check_point_stmt": "CHECKPOINT",
    "close_portal_stmt": "CLOSE",
    "composite_type_stmt": "CREATE",
    "constraints_set_stmt": "SET",
    "createdb_stmt": "CREATE",
    "define_stmt": "CREATE",
    "dropdb_stmt": "DROP",
    "index_stmt": "CREATE",
    "rename_stmt": "ALTER",
    "rule_stmt": "CREATE",
    "sec_label_stmt": "SECURITY",
    "variable_show_stmt": "SHOW",
    "view_stmt": "CREATE",
}
#: First words of node names that are the verb as they stand ("alter_table_stmt").
_PLAIN = frozenset(
    [
        "ALTER",
        "CALL",
        "CLUSTER",
        "COMMENT",
        "COPY",
        "CREATE",
        "DEALLOCATE",
        "DECLARE",
        "DELETE",
        "DISCARD",
        "DO",
        "DROP",
        "EXECUTE",
        "EXPLAIN",
        "FETCH",
        "GRANT",
        "IMPORT",
        "INSERT",
        "LISTEN",
        "LOAD",
        "LOCK",
        "MERGE",
        "NOTIFY",
        "PREPARE",
        "REASSIGN",
        "REFRESH",
        "REINDEX",
        "SELECT",
        "TRUNCATE",
        "UNLISTEN",
        "UPDATE",
        "VACUUM",
    ]
)
_TRANSACTION = {
    1: "BEGIN", 2: "BEGIN", 3: "COMMIT", 4: "ROLLBACK", 5: "SAVEPOINT", 6: "RELEASE",
    7: "ROLLBACK", 8: "PREPARE", 9: "COMMIT", 10: "ROLLBACK",
}  # fmt: skip
_DISCARD_ALL = 1
_WRITES = {
    "insert_stmt": "INSERT",
    "update_stmt": "UPDATE",
    "delete_stmt": "DELETE",
    "merge_stmt": "MERGE",
}
#: ObjectType numbers of DROP and COMMENT whose objects are relations: see `_relation_types`.
_RELATION_TYPES = frozenset({"TABLE", "VIEW", "MATVIEW", "FOREIGN_TABLE", "INDEX", "SEQUENCE"})
#: Messages that hold no relation and are common: not walked.
_LEAVES = frozenset(
    [
        "A_Const",
        "A_Star",
        "Alias",
        "BitString",
        "Boolean",
        "ColumnRef",
        "Float",
        "Integer",
        "ParamRef",
        "String",
        "TypeName",
    ]
)


class Meaning(NamedTuple):
    """What one statement does."""

    verb: str
    tables: tuple[str, ...]
    prepares: str | None = None  #: name of a statement that SQL's PREPARE makes
    prepared_verb: str = ""  #: what that statement does
    deallocates: str | None = None  #: name of the prepared statement that goes; "" for all of them
    executes: str | None = None  #: name of the prepared statement that SQL's EXECUTE runs


def meaning(node: Any) -> Meaning:
    """Return what the statement `node` (pg_query.Node) does."""
    kind = node.WhichOneof("node")
    statement = getattr(node, kind)
    tables = tuple(dict.fromkeys(_relations(statement, frozenset())))
    verb = _verb(kind, statement)
    if kind == "prepare_stmt":
        inner = statement.query.WhichOneof("node")
        inner_verb = _verb(inner, getattr(statement.query, inner))
        return Meaning(verb, tables, statement.name, inner_verb)
    if kind == "execute_stmt":
        return Meaning(verb, tables, executes=statement.name)
    if kind == "deallocate_stmt":
        return Meaning(verb, tables, deallocates="" if statement.isall else statement.name)
    if kind == "discard_stmt" and statement.target == _DISCARD_ALL:
        return Meaning(verb, tables, deallocates="")
    return Meaning(verb, tables)


def _verb(kind: str, statement: Any) -> str:
    """Return the verb. A SELECT whose WITH clause writes is named by that write; SELECT INTO
    creates.
    """
    if kind == "select_stmt":
        return _select_verb(statement)
    if kind == "transaction_stmt":
        return _TRANSACTION.get(statement.kind, UNKNOWN)
    if kind in ("grant_stmt", "grant_role_stmt"):
        return "GRANT" if statement.is_grant else "REVOKE"
    if kind == "variable_set_stmt":
        return "RESET" if statement.kind in (5, 6) else "SET"  # VAR_RESET, VAR_RESET_ALL
    if kind == "fetch_stmt":
        return "MOVE" if statement.ismove else "FETCH"
    if kind == "vacuum_stmt":
        return "VACUUM" if statement.is_vacuumcmd else "ANALYZE"
    if kind in _VERBS:
        return _VERBS[kind]
    word = kind.partition("_")[0].upper()
    return word if word in _PLAIN else UNKNOWN


def _select_verb(statement: Any) -> str:
    if statement.HasField("into_clause"):
        return "CREATE"
    for cte in statement.with_clause.ctes:
        query = cte.common_table_expr.ctequery
        write = _WRITES.get(query.WhichOneof("node") or "")
        if write:
            return write
    if statement.HasField("larg"):
        inner = _select_verb(statement.larg)
        return inner if inner != "SELECT" else _select_verb(statement.rarg)
    return "SELECT"


def _relations(message: Any, ctes: frozenset[str]) -> Iterator[str]:
    """Yield the relations below `message`; `ctes` are the names that hide a relation here."""
    name = message.DESCRIPTOR.name
    if name in _LEAVES:
        return
    if name == "RangeVar":
        if message.schemaname or message.relname not in ctes:
            yield _qualified(message)
        return
    if name in ("DropStmt", "CommentStmt", "SecLabelStmt"):
        yield from _named_objects(message)
    if name in ("InsertStmt", "UpdateStmt", "DeleteStmt", "MergeStmt"):
        yield _qualified(message.relation)
    if name in ("SelectStmt", "InsertStmt", "UpdateStmt", "DeleteStmt", "MergeStmt"):
        for found, scope in _with(message, ctes):
            yield from found
            ctes = scope
    for field, value in message.ListFields():
        if field.message_type is None or field.name in ("with_clause", "location"):
            continue
        if field.name == "relation" and name in (
            "InsertStmt",
            "UpdateStmt",
            "DeleteStmt",
            "MergeStmt",
        ):
            continue
        for part in value if field.is_repeated else (value,):
            yield from _relations(part, ctes)


def _with(message: Any, ctes: frozenset[str]) -> Iterator[tuple[Iterator[str], frozenset[str]]]:
    """Yield (relations of one WITH query, names in scope after it) in order of the text."""
    clause = message.with_clause
    queries = [node.common_table_expr for node in clause.ctes]
    if clause.recursive:
        ctes = ctes | {query.ctename for query in queries}
    for query in queries:
        found = _relations(query.ctequery, ctes)
        ctes = ctes | {query.ctename}
        yield found, ctes


def _named_objects(message: Any) -> Iterator[str]:
    """Yield the relations of statements that name them as lists of words (DROP TABLE a.b)."""
    field = "remove_type" if message.DESCRIPTOR.name == "DropStmt" else "objtype"
    values = message.DESCRIPTOR.fields_by_name[field].enum_type.values_by_number
    kind = values[getattr(message, field)].name.removeprefix("OBJECT_")
    if kind not in _RELATION_TYPES and kind != "COLUMN":
        return
    objects = message.objects if field == "remove_type" else (message.object,)
    for target in objects:
        words = [item.string.sval for item in target.list.items]
        yield ".".join(words[:-1] if kind == "COLUMN" else words)


def _qualified(relation: Any) -> str:
    parts = (relation.catalogname, relation.schemaname, relation.relname)
    return ".".join(part for part in parts if part)
