//! What can go wrong, and what is answered: the one place where a failure becomes a status code and a body.

use std::any::Any;

use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::domain::invoice::schema::InvalidField;
use crate::ingest::batch_writer::AppendError;
use crate::store::{StoreError, StoreErrorClass};

#[derive(Clone, Debug)]
pub enum ApiError {
    Unauthorized,
    Forbidden,
    /// Does not exist, or may not be seen: nobody learns which.
    NotFound,
    MethodNotAllowed,
    /// Which part of the path, and why it cannot be an id.
    InvalidPath(String),
    InvalidQuery(String),
    InvalidInvoice(Vec<InvalidField>),
    /// A webhook delivery that is not Stripe's. No detail: the sender is not to learn from it.
    InvalidSignature,
    /// The body ended early or could not be read.
    BadBody,
    TooLarge,
    /// The body did not come to its end in time.
    TooSlow,
    StripeInvoiceTaken,
    StripeInvoiceFixed,
    PreconditionFailed,
    /// Try again later. The reason is for the log.
    Unavailable(String),
    /// A bug. The reason is for the log.
    Internal(String),
}

impl ApiError {
    pub fn status(&self) -> StatusCode {
        match self {
            ApiError::Unauthorized => StatusCode::UNAUTHORIZED,
            ApiError::Forbidden => StatusCode::FORBIDDEN,
            ApiError::NotFound => StatusCode::NOT_FOUND,
            ApiError::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            ApiError::InvalidPath(_)
            | ApiError::InvalidQuery(_)
            | ApiError::InvalidInvoice(_)
            | ApiError::InvalidSignature
            | ApiError::BadBody => StatusCode::BAD_REQUEST,
            ApiError::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            ApiError::TooSlow => StatusCode::REQUEST_TIMEOUT,
            ApiError::StripeInvoiceTaken | ApiError::StripeInvoiceFixed => StatusCode::CONFLICT,
            ApiError::PreconditionFailed => StatusCode::PRECONDITION_FAILED,
            ApiError::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            ApiError::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    fn code_and_message(&self) -> (&'static str, &str) {
        match self {
            ApiError::Unauthorized => ("Unauthorized", "a valid API key is needed"),
            ApiError::Forbidden => ("Forbidden", "this needs an operator's key"),
            ApiError::NotFound => ("ResourceNotFound", "there is no such resource"),
            ApiError::MethodNotAllowed => (
                "MethodNotAllowed",
                "this resource does not take this method",
            ),
            ApiError::InvalidPath(reason) => ("InvalidPath", reason),
            ApiError::InvalidQuery(reason) => ("InvalidQuery", reason),
            ApiError::InvalidInvoice(_) => (
                "InvalidInvoice",
                "the body is no valid v1Invoice; details.faults says what is wrong and where",
            ),
            ApiError::InvalidSignature => ("InvalidSignature", "the delivery was not accepted"),
            ApiError::BadBody => ("InvalidBody", "the body could not be read to its end"),
            ApiError::TooLarge => ("PayloadTooLarge", "the body is larger than 1 MiB"),
            ApiError::TooSlow => ("RequestTimeout", "the body took too long to arrive"),
            ApiError::StripeInvoiceTaken => (
                "StripeInvoiceTaken",
                "another invoice holds this stripeInvoiceId",
            ),
            ApiError::StripeInvoiceFixed => (
                "StripeInvoiceFixed",
                "this invoice holds another stripeInvoiceId, which never changes",
            ),
            ApiError::PreconditionFailed => (
                "PreconditionFailed",
                "the invoice is not what the condition says",
            ),
            ApiError::Unavailable(_) => ("Unavailable", "try again later"),
            ApiError::Internal(_) => ("InternalError", "something went wrong here"),
        }
    }

    fn details(&self) -> Value {
        match self {
            ApiError::InvalidInvoice(faults) => json!({ "faults": faults }),
            _ => json!({}),
        }
    }

    /// What the log is told beyond the status.
    pub fn reason(&self) -> Option<&str> {
        match self {
            ApiError::Unavailable(reason) | ApiError::Internal(reason) => Some(reason),
            _ => None,
        }
    }

    /// Fills an answer that has the status of this error with its body.
    pub fn fill(&self, response: &mut Response, request_id: &str) {
        let (code, message) = self.code_and_message();
        let body =
            json!({"code": code, "message": message, "details": self.details(), "ref": request_id});
        let headers = response.headers_mut();
        headers.remove(header::CONTENT_LENGTH);
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        );
        if matches!(self, ApiError::Unavailable(_)) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("2"));
        }
        if matches!(self, ApiError::Unauthorized) {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("ApiKey"));
        }
        *response.body_mut() = Body::from(body.to_string());
    }
}

/// The error travels with the answer; `around` fills in the body, which names the request.
impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = self.status().into_response();
        response.extensions_mut().insert(self);
        response
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> ApiError {
        match error.class() {
            StoreErrorClass::Rejected => ApiError::Internal(error.to_string()),
            StoreErrorClass::Away | StoreErrorClass::Unavailable | StoreErrorClass::Contended => {
                ApiError::Unavailable(error.to_string())
            }
        }
    }
}

impl From<QueryRejection> for ApiError {
    fn from(_: QueryRejection) -> ApiError {
        ApiError::InvalidQuery("the query cannot be read, or repeats a name".to_owned())
    }
}

/// Whatever keeps a delivery from the disk: Stripe shall deliver it again.
impl From<AppendError> for ApiError {
    fn from(error: AppendError) -> ApiError {
        ApiError::Unavailable(error.to_string())
    }
}

/// An answer of the framework's that carries no error of ours.
pub fn of_status(status: StatusCode) -> Option<ApiError> {
    match status {
        StatusCode::PAYLOAD_TOO_LARGE => Some(ApiError::TooLarge),
        status if status.is_client_error() => Some(ApiError::BadBody),
        _ => None,
    }
}

/// A panic in a handler is a bug, and takes one request with it.
pub fn panicked(cause: Box<dyn Any + Send>) -> Response {
    let text = cause
        .downcast_ref::<&str>()
        .map(|s| s.to_string())
        .or_else(|| cause.downcast_ref::<String>().cloned());
    ApiError::Internal(format!("panicked: {}", text.unwrap_or_default())).into_response()
}
