// The outcomes of requests, as people who run the service group them.

export const ANSWERED = ["ok", "fallback"];
export const OVERLOAD = ["client_limit", "overloaded", "draining"];
export const REJECTED = [
  "malformed", "unauthorised", "unknown_model", "unknown_article", "unknown_route", "method_not_allowed", "too_slow", "too_large",
  "unsupported_media_type", "unsupported_coding", "unknown_expectation", "headers_too_large", "invalid", "no_encoder",
];

// Return the group of an outcome; what is not known is a failure, so that it is seen.
export function groupOf(outcome) {
  if (ANSWERED.includes(outcome)) return "answered";
  if (REJECTED.includes(outcome)) return "rejected";
  if (OVERLOAD.includes(outcome)) return "overload";
  return outcome === "cancelled" ? "cancelled" : "failed";
}
