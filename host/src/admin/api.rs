//! The table of endpoints: what is routed, who may call it, and its OpenAPI document.
//!
//! One list serves all three, so an endpoint cannot exist without a role or a description.

use std::sync::Arc;

use axum::{
    Router,
    extract::DefaultBodyLimit,
    handler::Handler,
    middleware,
    routing::{MethodFilter, on},
};
use serde_json::{Map, Value, json};

use super::{
    Admin,
    access::{self, Access},
};

/// Method of an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Method {
    Get,
    Post,
    Put,
    Delete,
}

impl Method {
    fn filter(self) -> MethodFilter {
        match self {
            Self::Get => MethodFilter::GET,
            Self::Post => MethodFilter::POST,
            Self::Put => MethodFilter::PUT,
            Self::Delete => MethodFilter::DELETE,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::Post => "post",
            Self::Put => "put",
            Self::Delete => "delete",
        }
    }
}

/// What an endpoint takes and gives, beyond its path.
#[derive(Debug, Default, Clone)]
pub(crate) struct Describe {
    /// Query parameters: name, JSON type, meaning.
    pub(crate) query: &'static [(&'static str, &'static str, &'static str)],
    /// Properties of the JSON body: name, JSON type, meaning; a trailing `*` means required.
    pub(crate) body: &'static [(&'static str, &'static str, &'static str)],
    /// Status of success; 200 when 0.
    pub(crate) status: u16,
    /// Media type of success; JSON when empty.
    pub(crate) produces: &'static str,
    /// Problem codes besides those of every endpoint: status and code.
    pub(crate) problems: &'static [(u16, &'static str)],
    /// Most bytes of its body, where that is more than usual.
    pub(crate) max_body: Option<usize>,
}

/// Collects endpoints into a router and a document.
pub(crate) struct Api {
    admin: Arc<Admin>,
    router: Router<Arc<Admin>>,
    paths: Map<String, Value>,
}

impl Api {
    pub(crate) fn new(admin: &Arc<Admin>) -> Self {
        Self {
            admin: Arc::clone(admin),
            router: Router::new(),
            paths: Map::new(),
        }
    }

    /// Adds one endpoint.
    pub(crate) fn add<H, T>(
        mut self,
        (method, path): (Method, &'static str),
        access: Access,
        summary: &'static str,
        describe: Describe,
        handler: H,
    ) -> Self
    where
        H: Handler<T, Arc<Admin>>,
        T: 'static,
    {
        let guard =
            middleware::from_fn_with_state((Arc::clone(&self.admin), access), access::guard);
        let mut route = on(method.filter(), handler);
        if let Some(bytes) = describe.max_body {
            route = route.route_layer(DefaultBodyLimit::max(bytes));
        }
        let route = route.route_layer(guard);
        self.router = self.router.route(path, route);
        let operations = self
            .paths
            .entry(path)
            .or_insert_with(|| Value::Object(Map::new()));
        if let Some(operations) = operations.as_object_mut() {
            operations.insert(
                method.name().to_owned(),
                operation(method, path, access, summary, &describe),
            );
        }
        self
    }

    /// The router of all endpoints, and the OpenAPI document.
    pub(crate) fn finish(mut self) -> (Router<Arc<Admin>>, Value) {
        self.paths.sort_keys();
        let document = json!({
            "openapi": "3.1.0",
            "info": {
                "title": "Stockade",
                "version": env!("CARGO_PKG_VERSION"),
                "description": "LMCache's HTTP API for what is served here, and Stockade's own under /v1. `x-access` says which role an endpoint asks for once tokens are configured: public, tenant (any role; a tenant sees its own), read (read-only and operator), operate (operator).",
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "paths": self.paths,
            "components": {
                "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
                "schemas": {"Problem": {
                    "description": "RFC 9457 problem details; `error` repeats the detail for LMCache's clients",
                    "type": "object",
                    "required": ["type", "title", "status", "code", "detail"],
                    "properties": {
                        "type": {"type": "string"},
                        "title": {"type": "string"},
                        "status": {"type": "integer"},
                        "code": {"type": "string"},
                        "detail": {"type": "string"},
                        "error": {"type": "string"},
                    },
                }},
                "responses": {"Problem": {
                    "description": "What is wrong and what to do",
                    "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
                }},
            },
        });
        (self.router, document)
    }
}

fn operation(
    method: Method,
    path: &str,
    access: Access,
    summary: &str,
    describe: &Describe,
) -> Value {
    let in_path = path
        .split('/')
        .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    let mut parameters: Vec<Value> = in_path
        .map(|name| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}}))
        .collect();
    parameters.extend(describe.query.iter().map(|(name, kind, meaning)| {
        json!({"name": name, "in": "query", "description": meaning, "schema": {"type": kind}})
    }));
    let status = match describe.status {
        0 => 200,
        status => status,
    };
    let media = match describe.produces {
        "" => "application/json",
        media => media,
    };
    let mut responses = Map::new();
    responses.insert(
        status.to_string(),
        json!({"description": "Success", "content": {media: {}}}),
    );
    for (status, code) in describe.problems {
        responses.insert(
            status.to_string(),
            json!({"description": code, "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}}),
        );
    }
    responses.insert(
        "default".to_owned(),
        json!({"$ref": "#/components/responses/Problem"}),
    );
    let id: Vec<&str> = path
        .split(['/', '{', '}', '.', '-'])
        .filter(|part| !part.is_empty())
        .collect();
    let mut operation = json!({
        "operationId": format!("{}_{}", method.name(), if id.is_empty() { "root".to_owned() } else { id.join("_") }),
        "summary": summary,
        "x-access": access.name(),
        "parameters": parameters,
        "responses": responses,
    });
    let Some(fields) = operation.as_object_mut() else {
        return operation;
    };
    if access != Access::Public {
        fields.insert("security".to_owned(), json!([{"bearer": []}]));
    }
    if !describe.body.is_empty() {
        let mut properties = Map::new();
        let mut required = Vec::new();
        for (name, kind, meaning) in describe.body {
            let bare = name.trim_end_matches('*');
            if bare != *name {
                required.push(bare);
            }
            properties.insert(
                bare.to_owned(),
                json!({"type": kind, "description": meaning}),
            );
        }
        fields.insert(
            "requestBody".to_owned(),
            json!({"content": {"application/json": {"schema": {"type": "object", "properties": properties, "required": required}}}}),
        );
    }
    operation
}
