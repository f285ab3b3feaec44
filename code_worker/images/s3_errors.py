"""Errors of S3 and botocore, and what each means for an image: one table, no default that hides a row."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final

from code_worker.errors import ImageRejectedError, SourceCredentialsError, TransientError
from code_worker.types import RejectReason

if TYPE_CHECKING:
    from collections.abc import Mapping


class Fault(Enum):
    """One kind of error, and what becomes of the job: a verdict, another try, or a pause of the whole source."""

    NOT_FOUND = (ImageRejectedError, RejectReason.NOT_FOUND, "no such object")
    DENIED = (ImageRejectedError, RejectReason.ACCESS_DENIED, "denied, or missing where listing is not permitted")
    ARCHIVED = (ImageRejectedError, RejectReason.ARCHIVED, "must be restored from its archive first")
    CHANGED = (ImageRejectedError, RejectReason.CONTENT_CHANGED, "was replaced while it was read")
    TIMEOUT = (TransientError, RejectReason.FETCH_TIMEOUT, "the server did not answer in time")
    TRUNCATED = (TransientError, RejectReason.FETCH_TRUNCATED, "the body was cut short")
    CHECKSUM = (TransientError, RejectReason.CHECKSUM_MISMATCH, "the body differs from its checksum")
    FAILED = (TransientError, RejectReason.FETCH_FAILED, "the server or the way to it failed")
    CREDENTIALS = (SourceCredentialsError, RejectReason.FETCH_FAILED, "credentials are missing, wrong or expired")
    NO_BUCKET = (
        SourceCredentialsError,
        RejectReason.FETCH_FAILED,
        "the server has no such bucket; check CODE_WORKER_S3__ENDPOINT_URL, __REGION and __PATH_STYLE",
    )
    REFUSED = (
        SourceCredentialsError,
        RejectReason.FETCH_FAILED,
        "the server refuses what every request holds; try CODE_WORKER_S3__CHECKSUM_MODE=false, then __PATH_STYLE",
    )
    MISCONFIGURED = (
        SourceCredentialsError,
        RejectReason.FETCH_FAILED,
        "the server cannot be used so; check CODE_WORKER_S3__ENDPOINT_URL, __REGION and __PATH_STYLE",
    )

    def __init__(self, kind: type[ImageRejectedError | TransientError], reason: RejectReason, meaning: str) -> None:
        self.kind = kind
        self.reason = reason
        self.meaning = meaning

    def error(self, source: str, what: str, said: str) -> ImageRejectedError | TransientError:
        """Our error for it.

        Args:
            source: What pauses when credentials fail, e.g. `s3://bucket`.
            what: Object or prefix that was asked for.
            said: Error code or exception name; never a message, which may quote keys and signatures.
        """
        detail = f"{what}: {said}: {self.meaning}"
        if issubclass(self.kind, SourceCredentialsError):
            error: ImageRejectedError | TransientError = self.kind(source, detail)
        else:
            error = self.kind(self.reason, detail)
        if isinstance(error, TransientError):
            error.cause = f"{said}: {self.meaning}"
        return error


def _rows(table: Mapping[Fault, str]) -> dict[str, Fault]:
    return {name: fault for fault, names in table.items() for name in names.split()}


CODES: Final = _rows(
    {
        # The second line: names that no object can have.
        Fault.NOT_FOUND: """
            NoSuchKey NoSuchVersion NotFound MethodNotAllowed
            InvalidURI KeyTooLongError InvalidObjectName
        """,
        # These and the next: no object of the bucket can pass, so none is to blame.
        Fault.NO_BUCKET: "NoSuchBucket NoSuchAccessPoint InvalidBucketName",
        # InvalidArgument: Backblaze B2 so refuses the header that asks for checksums; see `S3Source` on versions.
        Fault.REFUSED: "InvalidArgument NotImplemented UnsupportedArgument",
        # An object encrypted with a key that is gone, off or not ours is closed as well.
        Fault.DENIED: """
            AccessDenied AccessForbidden AllAccessDisabled Forbidden UnauthorizedAccess UnauthorizedAccessError
            ObjectLocked KMS.DisabledException KMS.InvalidKeyUsageException KMS.KMSInvalidStateException
            KMS.NotFoundException KMS.InvalidStateException
        """,
        Fault.ARCHIVED: "InvalidObjectState ObjectNotInActiveTierError",
        Fault.CHANGED: "PreconditionFailed",
        Fault.TIMEOUT: "RequestTimeout RequestTimeoutException",
        Fault.TRUNCATED: "IncompleteBody",
        Fault.CHECKSUM: "BadDigest InvalidDigest XAmzContentSHA256Mismatch XAmzContentChecksumMismatch",
        Fault.CREDENTIALS: """
            AccountProblem AuthFailure AuthorizationQueryParametersError CredentialsNotSupported ExpiredToken
            ExpiredTokenException IncompleteSignature InvalidAccessKeyId InvalidClientTokenId InvalidPayer
            InvalidSecurity InvalidSignature InvalidToken MissingAuthenticationToken MissingSecurityElement
            MissingSecurityHeader NotSignedUp OptInRequired RequestExpired RequestTimeTooSkewed SignatureDoesNotMatch
            TokenCodeInvalidError TokenRefreshRequired UnrecognizedClientException UserNotAuthorized
        """,
        Fault.MISCONFIGURED: """
            AuthorizationHeaderMalformed DeviceNotActiveError EndpointNotFound IllegalLocationConstraintException
            IncorrectEndpoint InvalidAddressingHeader InvalidHostHeader InvalidHttpMethod InvalidRegion
            InvalidTransferAcceleration MissingHostHeader NotDeviceOwnerError PermanentRedirect
            Redirect ServerSideEncryptionNotSupported UnsupportedSignature
        """,
        # First what overload and outages look like; then what cannot answer a read, where a later try is the least
        # harm: it blames neither image nor credentials.
        Fault.FAILED: """
            BandwidthLimitExceeded Busy ClientTokenConflict EC2ThrottledException InternalError InternalFailure
            InternalServerError KMS.ThrottlingException LimitExceeded LimitExceededException OperationAborted
            PriorRequestNotComplete ProvisionedThroughputExceededException RequestLimitExceeded RequestThrottled
            RequestThrottledException ServerBusy ServiceFailure ServiceUnavailable SlowDown TemporaryRedirect
            ThrottledException Throttling ThrottlingException TooManyRequests TooManyRequestsException
            TransactionInProgressException

            AccessControlListNotSupported AccessPointAlreadyOwnedByYou AmbiguousFieldName AmbiguousGrantByEmailAddress
            AnnotationLimitExceeded AnnotationNameTooLong BadRequest BucketAlreadyExists BucketAlreadyOwnedByYou
            BucketHasAccessPointsAttached BucketNotEmpty ConditionalRequestConflict ConnectionClosedByRequester
            CrossLocationLoggingProhibited EncryptionTypeMismatch EntityTooLarge EntityTooSmall ExpressionTooLong
            IdempotencyException IdempotencyParameterMismatch IllegalVersioningConfigurationException
            IncorrectNumberOfFilesInPostRequest InlineDataTooLarge
            InvalidAccessPoint InvalidAccessPointAliasError InvalidAnnotationName InvalidBucket
            InvalidBucketAclWithObjectOwnership InvalidBucketOwnerAWSAccountID InvalidBucketState
            InvalidEncryptionAlgorithmError InvalidLocationConstraint InvalidNamespaceHeader InvalidPart
            InvalidPartOrder InvalidPolicyDocument InvalidPrefix InvalidRange InvalidRequest InvalidSOAPRequest
            InvalidSessionException InvalidStorageClass InvalidTag InvalidTargetBucketForLogging InvalidWriteOffset
            MalformedACLError MalformedPOSTRequest MalformedPolicy MalformedXML MaxMessageLengthExceeded
            MaxPostPreDataLengthExceededError MetadataTooLarge MissingAttachment MissingContentLength
            MissingRequestBodyError MissingUploadObjectWithObjectLockHeaders NoLoggingStatusForKey
            NoSuchAccessPointPolicy NoSuchAnnotation NoSuchAsyncRequest NoSuchBucketPolicy NoSuchCORSConfiguration
            NoSuchInventoryConfig NoSuchLifecycleConfiguration NoSuchMultiRegionAccessPoint
            NoSuchObjectLockConfiguration NoSuchPublicAccessBlockConfiguration NoSuchResource NoSuchTagSet
            NoSuchUpload NoSuchWebsiteConfiguration NotModified ObjectAlreadyInActiveTierError
            ObjectLockConfigurationNotFoundError OwnershipControlsNotFoundError
            ReplicationConfigurationNotFoundError RequestHeaderSectionTooLarge RequestIsNotMultiPartContent
            RequestTorrentOfBucketError ResponseInterrupted RestoreAlreadyInProgress
            ServerSideEncryptionConfigurationNotFoundError TooManyAccessPoints TooManyBuckets
            TooManyMultiRegionAccessPointregionsError TooManyMultiRegionAccessPoints TooManyParts UnexpectedContent
            UnexpectedIPError UnresolvableGrantByEmailAddress UnsupportedMediaType
            UserKeyMustBeSpecified
        """,
    }
)
"""Error code of S3 (or of a server that speaks its protocol) → what it means when an object is read."""

EXCEPTIONS: Final = _rows(
    {
        Fault.TIMEOUT: "ConnectTimeoutError ReadTimeoutError",
        Fault.TRUNCATED: "ResponseStreamingError IncompleteReadError",
        Fault.CHECKSUM: "ChecksumError FlexibleChecksumError",
        Fault.FAILED: """
            BotoCoreError CapacityNotAvailableError ClientError ConnectionClosedError ConnectionError
            EndpointConnectionError EventStreamError HTTPClientError PaginationError ProxyConnectionError SSLError
            ResponseParserError HTTPError
        """,
        Fault.CREDENTIALS: """
            CredentialRetrievalError LoginAuthorizationCodeError LoginError LoginInsufficientPermissions
            LoginRefreshRequired LoginTokenLoadError MetadataRetrievalError NoAuthTokenError NoCredentialsError
            PartialCredentialsError ProfileNotFound RefreshWithMFAUnsupportedError SSOError SSOTokenLoadError
            TokenRetrievalError UnauthorizedSSOTokenError UnknownCredentialError UnknownTokenProviderError
            InfiniteLoopConfigError InvalidConfigError
        """,
        Fault.MISCONFIGURED: """
            AliasConflictParameterError ApiVersionNotFoundError AwsChunkedWrapperError BaseEndpointResolverError
            ConfigNotFound ConfigParseError DataNotFoundError EndpointProviderError EndpointResolutionError
            EndpointVariantError InvalidChecksumConfigError InvalidDNSNameError InvalidDefaultsMode
            InvalidEndpointConfigurationError InvalidEndpointDiscoveryConfigurationError InvalidExpressionError
            InvalidHostLabelError InvalidIMDSEndpointError InvalidIMDSEndpointModeError InvalidMaxRetryAttemptsError
            InvalidProxiesConfigError InvalidRegionError InvalidRetryConfigurationError InvalidRetryModeError
            InvalidS3AddressingStyleError InvalidS3UsEast1RegionalEndpointConfigError
            InvalidSTSRegionalEndpointsConfigError MD5UnavailableError MissingDependencyException
            MissingParametersError NoRegionError OperationNotPageableError ParamValidationError RangeError
            ServiceNotInRegionError StubAssertionError StubResponseError UnStubbedResponseError
            UnknownClientMethodError UnknownEndpointError UnknownEndpointResolutionBuiltInName
            UnknownFIPSEndpointError UnknownKeyError UnknownParameterError UnknownRegionError UnknownServiceError
            UnknownServiceStyle UnknownSignatureVersionError UnseekableStreamError UnsupportedOutpostResourceError
            UnsupportedS3AccesspointConfigurationError UnsupportedS3ArnError UnsupportedS3ConfigurationError
            UnsupportedS3ControlArnError UnsupportedS3ControlConfigurationError UnsupportedServiceProtocolsError
            UnsupportedSignatureVersionError ValidationError ValueError WaiterConfigError WaiterError
        """,
    }
)
"""Exception class of botocore and urllib3, by name → what it means; a subclass without a row takes its base's."""


def fault_of_code(code: str, status: int | None) -> Fault:
    """Meaning of an error answer.

    A code without a row is judged by its HTTP status: 404 and 410 mean missing, 401 and 403 denied, 412 changed,
    408 late, 301, 302 and 308 a wrong endpoint. Any other, 4xx as well as 5xx, means failed: the job is tried
    again and at last rejected as `fetch_failed`, which can be replayed; nothing is held against the image.

    Args:
        code: `Error.Code` of the answer; a number where the server sent no document.
        status: HTTP status, if known.
    """
    if (fault := CODES.get(code)) is not None:
        return fault
    status = status or (int(code) if code.isascii() and code.isdigit() else 0)
    return _STATUSES.get(status, Fault.FAILED)


def fault_of_exception(error: BaseException) -> Fault:
    """Meaning of an exception that is not an error answer; its nearest class with a row decides."""
    return next(
        (EXCEPTIONS[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in EXCEPTIONS), Fault.FAILED
    )


_STATUSES: Final = {
    301: Fault.MISCONFIGURED,
    302: Fault.MISCONFIGURED,
    308: Fault.MISCONFIGURED,
    401: Fault.DENIED,
    403: Fault.DENIED,
    404: Fault.NOT_FOUND,
    408: Fault.TIMEOUT,
    410: Fault.NOT_FOUND,
    412: Fault.CHANGED,
}
