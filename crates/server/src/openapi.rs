//! `/openapi.json`: the native API, described from the same descriptors that serve it.
//!
//! Promises. O1: every HTTP binding of `tenure.v1` is a path, with its parameters and bodies, and every message that they reach is a
//! schema. O2: the types are those of the JSON mapping: 64-bit numbers are strings of decimal digits, bytes are base64. O3: the prose is that of
//! the proto files. O4: it is a valid document of OpenAPI 3.1, and the same bytes each time.

use std::collections::{BTreeMap, BTreeSet};

use prost_reflect::{EnumDescriptor, FieldDescriptor, Kind, MessageDescriptor};
use serde_json::{Map, Value, json};

use crate::transcode::{Rule, Transcoder};

pub(crate) fn document(transcoder: &Transcoder) -> String {
    let prose = Prose::read();
    let mut schemas = Schemas::new(&prose);
    let mut paths: BTreeMap<String, Map<String, Value>> = BTreeMap::new();
    let mut services = BTreeSet::new();
    let mut ids = BTreeSet::new();
    for rule in transcoder.rules().iter().filter(|rule| rule.template.text.starts_with("/v1/")) {
        let (variables, path) = rule.template.for_openapi();
        let operation = operation(rule, &variables, id(rule, &mut ids), &mut schemas);
        services.insert(rule.method.parent_service().full_name().to_owned());
        paths.entry(path).or_default().insert(rule.verb.as_str().to_ascii_lowercase(), operation);
    }
    let tags: Vec<Value> = services
        .iter()
        .map(|service| {
            let name = service.rsplit('.').next().unwrap_or_default();
            with_prose(json!({ "name": name }), prose.of(service))
        })
        .collect();
    let schemas = schemas.finish();
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Tenure native API",
            "version": env!("CARGO_PKG_VERSION"),
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "servers": [{ "url": "/" }],
        "tags": tags,
        "paths": paths,
        "components": { "schemas": schemas },
    })
    .to_string()
}

/// What the proto files say of a name.
struct Prose(BTreeMap<&'static str, &'static str>);

impl Prose {
    fn read() -> Self {
        Self(tenure_wire::DESCRIPTIONS.lines().filter_map(|line| line.split_once('\t')).collect())
    }

    fn of(&self, name: &str) -> Option<&'static str> {
        self.0.get(name).copied()
    }
}

fn with_prose(mut value: Value, prose: Option<&str>) -> Value {
    if let (Some(object), Some(prose)) = (value.as_object_mut(), prose) {
        object.insert("description".into(), prose.into());
    }
    value
}

/// The first binding of a method has its name; others say by which verb they come.
fn id(rule: &Rule, ids: &mut BTreeSet<String>) -> String {
    let name = format!("{}_{}", rule.method.parent_service().name(), rule.method.name());
    let by_verb = format!("{name}_{}", rule.verb.as_str().to_ascii_lowercase());
    let more = (2..).map(|number| format!("{by_verb}_{number}"));
    let free = [name, by_verb.clone()].into_iter().chain(more).find(|id| !ids.contains(id)).unwrap_or(by_verb);
    ids.insert(free.clone());
    free
}

fn operation(rule: &Rule, variables: &[&str], id: String, schemas: &mut Schemas<'_>) -> Value {
    let service = rule.method.parent_service();
    let mut operation = Map::new();
    operation.insert("operationId".into(), id.into());
    operation.insert("tags".into(), json!([service.name()]));
    if let Some(prose) = schemas.prose.of(rule.method.full_name()) {
        operation.insert("description".into(), prose.into());
    }
    let parameters = parameters(rule, variables, schemas);
    if !parameters.is_empty() {
        operation.insert("parameters".into(), parameters.into());
    }
    if rule.has_body {
        let schema = schemas.reference(&rule.method.input());
        let content = json!({ "application/json": { "schema": schema } });
        operation.insert("requestBody".into(), json!({ "required": true, "content": content }));
    }
    let mut answers = json!({
        "200": answer(rule, schemas),
        "default": {
            "description": "Refused; `code` and `facts` say why.",
            "content": { "application/problem+json": { "schema": { "$ref": "#/components/schemas/Problem" } } },
        },
    });
    if is_tagged(rule) && rule.verb == http::Method::GET {
        answers["304"] = json!({ "description": "Still as the tag in If-None-Match says." });
    }
    operation.insert("responses".into(), answers);
    Value::Object(operation)
}

/// One message, or a stream of them: a line each, or an event each for who accepts events.
fn answer(rule: &Rule, schemas: &mut Schemas<'_>) -> Value {
    let message = schemas.reference(&rule.method.output());
    if !rule.method.is_server_streaming() {
        let etag = json!({ "ETag": { "description": "The key's `mod_revision`.", "schema": { "type": "string" } } });
        let mut answer = json!({ "description": "Done.", "content": { "application/json": { "schema": message } } });
        if is_tagged(rule) && rule.verb != http::Method::DELETE {
            answer["headers"] = etag;
        }
        return answer;
    }
    let line = json!({ "type": "object", "properties": { "result": message }, "additionalProperties": false });
    json!({
        "description": "A stream: a JSON object per line, or server-sent events whose data is the message itself and whose id, where there is one, is its `resume`. \
            An error behind the first answer is the last line, under `error`, or an event named `error`.",
        "content": {
            "application/json": { "schema": line },
            "text/event-stream": { "schema": { "type": "string" } },
        },
    })
}

/// Of one key, by its path.
fn is_tagged(rule: &Rule) -> bool {
    rule.method.parent_service().full_name() == "tenure.v1.Kv" && rule.template.text == "/v1/kv/{key=**}"
}

fn header(name: &str, description: &str) -> Value {
    json!({ "name": name, "in": "header", "required": false, "description": description, "schema": { "type": "string" } })
}

fn parameters(rule: &Rule, variables: &[&str], schemas: &mut Schemas<'_>) -> Vec<Value> {
    let mut parameters = Vec::new();
    for field in rule.method.input().fields() {
        let in_path = variables.contains(&field.name());
        let is_scalar = !matches!(field.kind(), Kind::Message(_)) && !field.is_map();
        if in_path || (!rule.has_body && is_scalar) {
            let parameter = json!({
                "name": field.name(),
                "in": if in_path { "path" } else { "query" },
                "required": in_path,
                "schema": schemas.field(&field),
            });
            parameters.push(with_prose(parameter, schemas.prose.of(field.full_name())));
        }
    }
    if rule.method.input().get_field_by_name("request").is_some() {
        parameters.push(header("Idempotency-Key", "The request id: 32 hexadecimal digits, hyphens allowed."));
    }
    if rule.method.is_server_streaming() && rule.method.input().get_field_by_name("resume").is_some() {
        parameters.push(header(
            "Last-Event-ID",
            "The `resume` to go on from, as a browser gives it back; it wins over the one in the address.",
        ));
    }
    if is_tagged(rule) {
        match rule.verb {
            http::Method::GET => parameters.push(header("If-None-Match", "The tag that is known already.")),
            _ => {
                parameters.push(header("If-Match", "The tag that the key must have, or `*`: there must be such a key."))
            }
        }
        if rule.verb == http::Method::PUT {
            parameters.push(header("If-None-Match", "`*`: there must be no such key."));
        }
    }
    parameters
}

/// Schemas by full name; what they refer to is added until nothing is missing.
struct Schemas<'p> {
    prose: &'p Prose,
    done: BTreeMap<String, Value>,
    asked: BTreeSet<String>,
    open: Vec<MessageDescriptor>,
}

impl<'p> Schemas<'p> {
    fn new(prose: &'p Prose) -> Self {
        Self { prose, done: BTreeMap::new(), asked: BTreeSet::new(), open: Vec::new() }
    }

    fn reference(&mut self, kind: &MessageDescriptor) -> Value {
        if self.asked.insert(kind.full_name().to_owned()) {
            self.open.push(kind.clone());
        }
        json!({ "$ref": format!("#/components/schemas/{}", kind.full_name()) })
    }

    fn finish(mut self) -> BTreeMap<String, Value> {
        while let Some(kind) = self.open.pop() {
            let schema = self.message(&kind);
            self.done.insert(kind.full_name().to_owned(), schema);
        }
        self.done.insert("Problem".to_owned(), problem());
        self.done
    }

    fn message(&mut self, kind: &MessageDescriptor) -> Value {
        let described = |field: &FieldDescriptor, schemas: &mut Self| {
            let schema = schemas.field(field);
            with_prose(schema, schemas.prose.of(field.full_name()))
        };
        let properties: Map<String, Value> =
            kind.fields().map(|field| (field.name().to_owned(), described(&field, self))).collect();
        let schema = json!({ "type": "object", "properties": properties, "additionalProperties": false });
        with_prose(schema, self.prose.of(kind.full_name()))
    }

    fn field(&mut self, field: &FieldDescriptor) -> Value {
        if field.is_map()
            && let Kind::Message(entry) = field.kind()
        {
            let value = self.kind(&entry.map_entry_value_field().kind());
            return json!({ "type": "object", "additionalProperties": value });
        }
        let item = self.kind(&field.kind());
        if field.is_list() { json!({ "type": "array", "items": item }) } else { item }
    }

    fn kind(&mut self, kind: &Kind) -> Value {
        match kind {
            Kind::Message(kind) => self.reference(kind),
            Kind::Enum(kind) => enumeration(kind),
            Kind::Bool => json!({ "type": "boolean" }),
            Kind::String => json!({ "type": "string" }),
            Kind::Bytes => json!({ "type": "string", "contentEncoding": "base64" }),
            Kind::Uint64 | Kind::Fixed64 => json!({ "type": "string", "pattern": "^[0-9]+$", "format": "uint64" }),
            Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => {
                json!({ "type": "string", "pattern": "^-?[0-9]+$", "format": "int64" })
            }
            Kind::Uint32 | Kind::Fixed32 => json!({ "type": "integer", "minimum": 0 }),
            Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => json!({ "type": "integer" }),
            Kind::Float | Kind::Double => json!({ "type": "number" }),
        }
    }
}

fn enumeration(kind: &EnumDescriptor) -> Value {
    let names: Vec<_> = kind.values().map(|value| value.name().to_owned()).collect();
    json!({ "type": "string", "enum": names })
}

/// The body of a refusal, which is not a message of the protocol.
fn problem() -> Value {
    json!({
        "type": "object",
        "required": ["type", "title", "status", "detail", "code", "retryable", "facts"],
        "properties": {
            "type": { "type": "string" },
            "title": { "type": "string" },
            "status": { "type": "integer" },
            "detail": { "type": "string" },
            "code": { "type": "string" },
            "retryable": { "type": "boolean" },
            "outcome": { "type": "string", "enum": ["not_applied", "unknown", "applied"] },
            "retry_after_ms": { "type": "string", "pattern": "^[0-9]+$" },
            "facts": { "type": "object", "additionalProperties": { "type": "string" } },
            "current": { "type": "object" },
        },
    })
}
