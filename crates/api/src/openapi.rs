//! OpenAPI document: generated from the handlers and the wire types, with the limits from the
//! settings.

use std::collections::BTreeMap;

use batchwright_batch::BatchConfig;
use batchwright_domain::endpoint::Endpoint;
use batchwright_domain::webhook::EventType;
use batchwright_tenancy::Scopes;
use serde_json::{Value, json};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{
    ContentBuilder, HeaderBuilder, OpenApi, Ref, RefOr, Response, ResponseBuilder,
    ResponsesBuilder, ServerBuilder,
};
use utoipa::{IntoResponses, PartialSchema, ToSchema};

use super::ROUTE_PREFIXES;
use super::wire::ErrorBody;

/// Default response of every operation: an error object.
pub(crate) struct Errors;

impl IntoResponses for Errors {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        let content =
            ContentBuilder::new().schema(Some(Ref::from_schema_name(ErrorBody::name()))).build();
        let id = HeaderBuilder::new()
            .schema(Some(String::schema()))
            .description(Some("Id of the request in the server's log"))
            .build();
        let error = ResponseBuilder::new()
            .description("Error: 4xx if the request has to change, 5xx if the server failed")
            .header("x-request-id", id)
            .content("application/json", content)
            .build();
        ResponsesBuilder::new().response("default", error).build().into()
    }
}

/// Returns the complete document: adds the servers, the error object and the limits to `generated`.
pub(crate) fn document(mut generated: OpenApi, settings: &BatchConfig) -> Value {
    generated.info.title = "Batchwright".into();
    let description = "The OpenAI Batch API (files, batches, models), projects and their keys.";
    generated.info.description = Some(description.into());
    generated.servers = Some(
        ROUTE_PREFIXES.iter().map(|prefix| ServerBuilder::new().url(*prefix).build()).collect(),
    );
    let components = generated.components.get_or_insert_default();
    let mut schemas = Vec::new();
    ErrorBody::schemas(&mut schemas);
    schemas.push((ErrorBody::name().into(), ErrorBody::schema()));
    components.schemas.extend(schemas);
    let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
    components.add_security_scheme("key", SecurityScheme::Http(bearer));
    generated.security = Some(vec![SecurityRequirement::new("key", Vec::<String>::new())]);
    let mut document = serde_json::to_value(&generated).unwrap_or_default();
    for (pointer, value) in [
        (
            "/components/schemas/CreateBatch/properties/endpoint/enum",
            json!(Endpoint::ALL.map(Endpoint::as_str)),
        ),
        (
            "/components/schemas/CreateBatch/properties/completion_window/enum",
            settings.completion_windows.names().collect(),
        ),
        (
            "/components/schemas/CreateBatch/properties/metadata/maxProperties",
            json!(settings.max_metadata_pairs),
        ),
        (
            "/components/schemas/CreateBatch/properties/metadata/additionalProperties/maxLength",
            json!(settings.max_metadata_value),
        ),
        (
            "/components/schemas/CreateBatch/properties/metadata/propertyNames",
            json!({"type": "string", "maxLength": settings.max_metadata_key}),
        ),
        (
            "/components/schemas/WebhookEventType",
            json!({
                "type": "string",
                "enum": EventType::ALL.iter().map(|event| event.as_str()).collect::<Vec<_>>(),
            }),
        ),
        ("/components/schemas/KeyScope", json!({"type": "string", "enum": Scopes::all().names()})),
        (
            "/components/schemas/UploadForm/dependentRequired",
            json!({
                "expires_after[anchor]": ["expires_after[seconds]"],
                "expires_after[seconds]": ["expires_after[anchor]"],
            }),
        ),
        (
            "/paths/~1batches/get/parameters/1/schema/maximum",
            json!(settings.max_batches_per_page.get()),
        ),
        // Some clients send every parameter: an empty value counts as absent.
        ("/paths/~1files/get/parameters/2/schema/enum", json!(["asc", "desc", ""])),
        (
            "/paths/~1files/get/parameters/1/schema/maximum",
            json!(settings.max_files_per_page.get()),
        ),
    ] {
        set(&mut document, pointer, value);
    }
    document
}

/// Sets the member of an object at a JSON pointer. Does nothing if there is no such object.
fn set(document: &mut Value, pointer: &str, value: Value) {
    if let Some((parent, key)) = pointer.rsplit_once('/')
        && let Some(Value::Object(parent)) = document.pointer_mut(parent)
    {
        parent.insert(key.to_owned(), value);
    }
}
