//! The errors of the HTTP interface. Only this file turns a failure into a status code and a body.

use std::any::Any;
use std::error::Error;

use axum::body::Body;
use axum::extract::rejection::{BytesRejection, QueryRejection};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::server::watched::BodyError;
use crate::domain::invoice::schema::InvalidField;
use crate::ingest::batch_writer::AppendError;
use crate::store::{StoreError, StoreErrorClass};

/// A failed request, as the client sees it.
#[derive(Clone, Debug)]
pub enum ApiError {
    Unauthorized,
    Forbidden,
    /// The resource does not exist or belongs to another tenant. The response does not reveal
    /// which.
    NotFound,
    MethodNotAllowed,
    /// Names the part of the path and why it is not a valid id.
    InvalidPath(String),
    InvalidQuery(String),
    InvalidInvoice(Vec<InvalidField>),
    /// A webhook delivery that is not from Stripe. Carries no details that could help a forger.
    InvalidSignature,
    /// An HTTP/1.1 request without a `Host` header, or with several.
    InvalidHost,
    /// The body ended early or could not be read.
    BadBody,
    TooLarge,
    /// The body did not arrive in time.
    TooSlow,
    StripeInvoiceTaken,
    StripeInvoiceFixed,
    PreconditionFailed,
    /// The request was dropped to free memory for others; the client should retry later. It is not
    /// logged as an error, because a flood of large bodies causes it.
    Overloaded,
    /// The client should retry later. Only the log shows the reason.
    Unavailable(String),
    /// A bug. Only the log shows the reason.
    Internal(String),
}

impl ApiError {
    /// Returns the status code of the response.
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
            | ApiError::InvalidHost
            | ApiError::BadBody => StatusCode::BAD_REQUEST,
            ApiError::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            ApiError::TooSlow => StatusCode::REQUEST_TIMEOUT,
            ApiError::StripeInvoiceTaken | ApiError::StripeInvoiceFixed => StatusCode::CONFLICT,
            ApiError::PreconditionFailed => StatusCode::PRECONDITION_FAILED,
            ApiError::Overloaded | ApiError::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            ApiError::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    fn code_and_message(&self) -> (&'static str, &str) {
        match self {
            ApiError::Unauthorized => ("Unauthorized", "a valid API key is needed"),
            ApiError::Forbidden => ("Forbidden", "an operator's key is needed"),
            ApiError::NotFound => ("ResourceNotFound", "there is no such resource"),
            ApiError::MethodNotAllowed => (
                "MethodNotAllowed",
                "this resource does not support this method",
            ),
            ApiError::InvalidPath(reason) => ("InvalidPath", reason),
            ApiError::InvalidQuery(reason) => ("InvalidQuery", reason),
            ApiError::InvalidInvoice(_) => (
                "InvalidInvoice",
                "the body is not a valid v1Invoice; details.faults lists every fault",
            ),
            ApiError::InvalidSignature => ("InvalidSignature", "the delivery was not accepted"),
            ApiError::InvalidHost => (
                "InvalidHost",
                "an HTTP/1.1 request needs exactly one Host header",
            ),
            ApiError::BadBody => ("InvalidBody", "the body is incomplete"),
            ApiError::TooLarge => ("PayloadTooLarge", "the body is larger than 1 MiB"),
            ApiError::TooSlow => ("RequestTimeout", "the body took too long to arrive"),
            ApiError::StripeInvoiceTaken => (
                "StripeInvoiceTaken",
                "another invoice has this stripeInvoiceId",
            ),
            ApiError::StripeInvoiceFixed => (
                "StripeInvoiceFixed",
                "this invoice has another stripeInvoiceId, which cannot change",
            ),
            ApiError::PreconditionFailed => (
                "PreconditionFailed",
                "the invoice does not meet the condition of If-Match or If-None-Match",
            ),
            ApiError::Overloaded | ApiError::Unavailable(_) => ("Unavailable", "try again later"),
            ApiError::Internal(_) => (
                "InternalError",
                "unexpected failure; the server log has the details",
            ),
        }
    }

    fn details(&self) -> Value {
        match self {
            ApiError::InvalidInvoice(faults) => json!({ "faults": faults }),
            _ => json!({}),
        }
    }

    /// Returns the reason for the log, which the client does not see.
    pub fn reason(&self) -> Option<&str> {
        match self {
            ApiError::Unavailable(reason) | ApiError::Internal(reason) => Some(reason),
            _ => None,
        }
    }

    /// Writes the body of this error into a response that already has its status.
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

        if self.status() == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("2"));
        }
        if matches!(self, ApiError::Unauthorized) {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("ApiKey"));
        }

        *response.body_mut() = Body::from(body.to_string());
    }
}

/// Attaches the error to the response as an extension. `middleware` writes the body, because the
/// body contains the request id.
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
        ApiError::InvalidQuery("the query cannot be parsed or repeats a parameter".to_owned())
    }
}

/// Answers 503 if the body was shed to free memory. For any other incomplete body, the client is at
/// fault.
impl From<BytesRejection> for ApiError {
    fn from(rejection: BytesRejection) -> ApiError {
        match &rejection {
            BytesRejection::FailedToBufferBody(failed) if failed.status() == 413 => {
                ApiError::TooLarge
            }
            _ if is_shed(&rejection) => ApiError::Overloaded,
            _ => ApiError::BadBody,
        }
    }
}

/// Returns whether [`BodyError::Shed`] is among the causes of a rejection.
fn is_shed(rejection: &BytesRejection) -> bool {
    let mut cause: Option<&(dyn Error + 'static)> = Some(rejection);
    while let Some(error) = cause {
        if matches!(error.downcast_ref(), Some(BodyError::Shed)) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Answers 503 if a delivery was not stored, so that Stripe redelivers it.
impl From<AppendError> for ApiError {
    fn from(error: AppendError) -> ApiError {
        ApiError::Unavailable(error.to_string())
    }
}

/// Returns the error for a response that the framework created, or `None` if its status is not a
/// client error.
pub fn from_status(status: StatusCode) -> Option<ApiError> {
    match status {
        StatusCode::PAYLOAD_TOO_LARGE => Some(ApiError::TooLarge),
        status if status.is_client_error() => Some(ApiError::BadBody),
        _ => None,
    }
}

/// Answers a request whose handler panicked. Other requests are not affected.
pub fn panicked(cause: Box<dyn Any + Send>) -> Response {
    let text = cause
        .downcast_ref::<&str>()
        .map(std::string::ToString::to_string)
        .or_else(|| cause.downcast_ref::<String>().cloned());
    ApiError::Internal(format!("panicked: {}", text.unwrap_or_default())).into_response()
}
