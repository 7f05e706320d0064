//! The description of this API, made from its handlers and wire types, with the limits of this server.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use utoipa::openapi::{
    ContentBuilder, HeaderBuilder, OpenApi, Ref, RefOr, Response, ResponseBuilder,
    ResponsesBuilder, ServerBuilder,
};
use utoipa::{IntoResponses, PartialSchema, ToSchema};

use super::PREFIXES;
use super::wire::ErrorBody;
use crate::batch::ENDPOINTS;
use crate::config::Settings;

/// Every operation can end in an error object.
pub struct Errors;

impl IntoResponses for Errors {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        let content =
            ContentBuilder::new().schema(Some(Ref::from_schema_name(ErrorBody::name()))).build();
        let id = HeaderBuilder::new()
            .schema(Some(String::schema()))
            .description(Some("Names the request in the server's log"))
            .build();
        let error = ResponseBuilder::new()
            .description("An error: 4xx if the request has to change, 5xx if the server failed")
            .header("x-request-id", id)
            .content("application/json", content)
            .build();
        ResponsesBuilder::new().response("default", error).build().into()
    }
}

/// Completes what was gathered from the handlers.
pub fn document(mut gathered: OpenApi, settings: &Settings) -> Value {
    gathered.info.title = "Batchwright".into();
    gathered.info.description = Some("The OpenAI Batch API: files, batches, models.".into());
    gathered.servers =
        Some(PREFIXES.iter().map(|prefix| ServerBuilder::new().url(*prefix).build()).collect());
    let components = gathered.components.get_or_insert_default();
    let mut schemas = Vec::new();
    ErrorBody::schemas(&mut schemas);
    schemas.push((ErrorBody::name().into(), ErrorBody::schema()));
    components.schemas.extend(schemas);
    let mut document = serde_json::to_value(&gathered).unwrap_or_default();
    for (place, value) in [
        ("/components/schemas/CreateBatch/properties/endpoint/enum", json!(ENDPOINTS)),
        (
            "/components/schemas/CreateBatch/properties/completion_window/enum",
            settings.completion_window_names().collect(),
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
            "/components/schemas/UploadForm/dependentRequired",
            json!({"expires_after[anchor]": ["expires_after[seconds]"], "expires_after[seconds]": ["expires_after[anchor]"]}),
        ),
        (
            "/paths/~1batches/get/parameters/1/schema/maximum",
            json!(settings.max_batches_per_page.get()),
        ),
        // Some clients send every parameter; an empty one is as good as none.
        ("/paths/~1files/get/parameters/2/schema/enum", json!(["asc", "desc", ""])),
        (
            "/paths/~1files/get/parameters/1/schema/maximum",
            json!(settings.max_files_per_page.get()),
        ),
    ] {
        set(&mut document, place, value);
    }
    document
}

/// Sets a member of an object that is there.
fn set(document: &mut Value, place: &str, value: Value) {
    if let Some((parent, key)) = place.rsplit_once('/')
        && let Some(Value::Object(parent)) = document.pointer_mut(parent)
    {
        parent.insert(key.to_owned(), value);
    }
}
