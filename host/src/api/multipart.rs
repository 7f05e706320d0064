//! Bodies of `multipart/form-data`, read as they come.

use axum::extract::multipart::{Field, MultipartError};
use axum::extract::{FromRequest, Multipart, Request};

use super::error::ApiError;

/// Longest part that is no file, in bytes.
const LONGEST_TEXT: usize = 1024;

pub struct Form(Multipart);

impl Form {
    pub async fn read(request: Request) -> Result<Self, ApiError> {
        match Multipart::from_request(request, &()).await {
            Ok(multipart) => Ok(Self(multipart)),
            Err(_) => Err(ApiError::bad_request("The request body must be multipart/form-data with a boundary.")),
        }
    }

    pub async fn next(&mut self) -> Result<Option<Field<'_>>, ApiError> {
        self.0.next_field().await.map_err(|error| broken(&error))
    }
}

pub fn broken(error: &MultipartError) -> ApiError {
    if let Some(late) = ApiError::of_late_body(error) {
        return late;
    }
    ApiError::bad_request(format!("The multipart body could not be read: {}.", error.body_text()))
}

/// The text of a short part.
pub async fn part_text(mut part: Field<'_>) -> Result<String, ApiError> {
    let name = part.name().unwrap_or_default().to_owned();
    let mut text = Vec::new();
    while let Some(bytes) = part.chunk().await.map_err(|error| broken(&error))? {
        if text.len().saturating_add(bytes.len()) > LONGEST_TEXT {
            return Err(ApiError::invalid(&name, "invalid_value", format!("The part '{name}' is too long.")));
        }
        text.extend_from_slice(&bytes);
    }
    String::from_utf8(text)
        .map_err(|_| ApiError::invalid(&name, "invalid_value", format!("The part '{name}' is not UTF-8.")))
}
