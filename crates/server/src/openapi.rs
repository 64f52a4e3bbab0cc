//! `/openapi.json`: the native API, described from the same descriptors that serve it.
//!
//! Promises. O1: every HTTP binding of `tenure.v1` is a path, with its parameters and bodies, and every message that they reach is a
//! schema. O2: the types are those of the JSON mapping: 64-bit numbers are strings of decimal digits, bytes are base64.
//! Not promised. Comments of the proto files are not in the descriptors, so the document has no prose beyond names.

use std::collections::{BTreeMap, BTreeSet};

use prost_reflect::{EnumDescriptor, FieldDescriptor, Kind, MessageDescriptor};
use serde_json::{Map, Value, json};

use crate::transcode::{Rule, Transcoder};

pub(crate) fn document(transcoder: &Transcoder) -> String {
    let mut schemas = Schemas::default();
    let mut paths: BTreeMap<String, Map<String, Value>> = BTreeMap::new();
    for rule in transcoder.rules().iter().filter(|rule| rule.template.text.starts_with("/v1/")) {
        let (variables, path) = rule.template.for_openapi();
        let operation = operation(rule, &variables, &mut schemas);
        paths.entry(path).or_default().insert(rule.verb.as_str().to_ascii_lowercase(), operation);
    }
    let schemas = schemas.finish();
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Tenure native API",
            "version": env!("CARGO_PKG_VERSION"),
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "paths": paths,
        "components": { "schemas": schemas },
    })
    .to_string()
}

fn operation(rule: &Rule, variables: &[&str], schemas: &mut Schemas) -> Value {
    let service = rule.method.parent_service();
    let mut operation = Map::new();
    // A method with two bindings needs two ids.
    let suffix = if rule.has_body || rule.verb == http::Method::GET { "" } else { "_2" };
    let is_second = rule.has_body && !is_change(rule);
    let name = format!("{}_{}{}", service.name(), rule.method.name(), if is_second { "_post" } else { suffix });
    operation.insert("operationId".into(), name.into());
    operation.insert("tags".into(), json!([service.name()]));
    let parameters = parameters(rule, variables, schemas);
    if !parameters.is_empty() {
        operation.insert("parameters".into(), parameters.into());
    }
    if rule.has_body {
        let schema = schemas.reference(&rule.method.input());
        let content = json!({ "application/json": { "schema": schema } });
        operation.insert("requestBody".into(), json!({ "required": true, "content": content }));
    }
    let answer = schemas.reference(&rule.method.output());
    let answers = json!({
        "200": { "description": "Done.", "content": { "application/json": { "schema": answer } } },
        "default": {
            "description": "Refused; `code` and `facts` say why.",
            "content": { "application/problem+json": { "schema": { "$ref": "#/components/schemas/Problem" } } },
        },
    });
    operation.insert("responses".into(), answers);
    Value::Object(operation)
}

/// Changes carry a request id or have no other binding; reads that also take a body are second bindings of a GET.
fn is_change(rule: &Rule) -> bool {
    let verb = rule.template.text.rsplit_once(':').map_or("", |(_, verb)| verb);
    !matches!(verb, "get" | "range" | "list")
}

fn parameters(rule: &Rule, variables: &[&str], schemas: &mut Schemas) -> Vec<Value> {
    let mut parameters = Vec::new();
    for field in rule.method.input().fields() {
        let in_path = variables.contains(&field.name());
        let is_scalar = !matches!(field.kind(), Kind::Message(_)) && !field.is_map();
        if in_path || (!rule.has_body && is_scalar) {
            parameters.push(json!({
                "name": field.name(),
                "in": if in_path { "path" } else { "query" },
                "required": in_path,
                "schema": schemas.field(&field),
            }));
        }
    }
    if rule.method.input().get_field_by_name("request").is_some() {
        parameters.push(json!({
            "name": "Idempotency-Key",
            "in": "header",
            "required": false,
            "description": "The request id: 32 hexadecimal digits, hyphens allowed.",
            "schema": { "type": "string" },
        }));
    }
    parameters
}

/// Schemas by full name; what they refer to is added until nothing is missing.
#[derive(Default)]
struct Schemas {
    done: BTreeMap<String, Value>,
    asked: BTreeSet<String>,
    open: Vec<MessageDescriptor>,
}

impl Schemas {
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
        let properties: Map<String, Value> =
            kind.fields().map(|field| (field.name().to_owned(), self.field(&field))).collect();
        json!({ "type": "object", "properties": properties, "additionalProperties": false })
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
