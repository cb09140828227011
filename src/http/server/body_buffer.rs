//! The buffer for the whole body of a request, whatever the size of its chunks.

use axum::body::Bytes;

/// Capacity of the first buffer, in bytes. Most deliveries fit.
const FIRST_CAPACITY: usize = 8 * 1024;

/// A buffer that collects the chunks of a body.
///
/// Storing a chunk separately would cost 25 bytes more than its content, so a body in chunks of one
/// byte would cost 25 times its size.
#[derive(Default)]
pub struct BodyBuffer {
    bytes: Vec<u8>,
}

impl BodyBuffer {
    /// Appends a chunk and returns by how many bytes the buffer grew in memory. `expected` is the
    /// number of bytes still to come, from the request head; 0 if unknown.
    ///
    /// The capacity follows the bytes that have arrived, not the announced length, because
    /// announcing costs a client nothing.
    pub fn push(&mut self, chunk: &[u8], expected: u64) -> usize {
        let before = self.bytes.capacity();
        let needed = self.bytes.len() + chunk.len();
        if needed > before {
            let doubled = needed.max(2 * before).max(FIRST_CAPACITY);
            let total = usize::try_from(expected)
                .ok()
                .filter(|expected| *expected > 0)
                .map_or(usize::MAX, |expected| needed.saturating_add(expected));
            let capacity = doubled.min(total);
            self.bytes.reserve_exact(capacity - self.bytes.len());
        }

        self.bytes.extend_from_slice(chunk);
        self.bytes.capacity() - before
    }

    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Returns the bytes so far and empties the buffer.
    pub fn take(&mut self) -> Bytes {
        std::mem::take(&mut self.bytes).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiny_chunks_share_one_buffer_and_growth_is_reported() {
        let mut buffer = BodyBuffer::default();
        let grown: usize = (0..100_000).map(|n| buffer.push(&[n as u8], 0)).sum();
        assert_eq!(buffer.len(), 100_000);
        assert!((100_000..=200_000).contains(&grown), "{grown}");
        assert_eq!(buffer.take()[99_999], 99_999_u32 as u8);
        assert!(buffer.is_empty());
    }

    #[test]
    fn capacity_does_not_exceed_announced_length() {
        let mut buffer = BodyBuffer::default();
        assert_eq!(buffer.push(&[1; 100], 900), 1000);
        assert_eq!(buffer.push(&[1; 900], 0), 0);

        let mut announced = BodyBuffer::default();
        assert!(
            announced.push(&[1], 1_000_000) <= FIRST_CAPACITY,
            "the capacity follows the bytes that arrived"
        );
    }
}
