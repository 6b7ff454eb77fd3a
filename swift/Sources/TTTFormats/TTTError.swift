import Foundation

/// What goes wrong in a way that can be mended.
public enum TTTError: Error, Equatable, Sendable {
    case notATTTPackage(String)
    case formatVersion(Int)
    case unreadableFile(String, String)
    case unwritableFile(String, String)
    case damaged(String)
    case unsupported(String)
    case unexpectedOutput(String)
    case emptyPrompt
    case tokenOutsideVocabulary(Int, size: Int)
    case invalidOption(String)
    case notANumber
    case stateLost
    case notAState
    case damagedState
    case stateOfAnotherModel
}

extension TTTError: LocalizedError {
    public var errorDescription: String? {
        switch self {
        case .notATTTPackage(let what):
            return "This is not a package of a TTT model (\(what)); export it with `convert.py coreml`."
        case .formatVersion(let version):
            return "The package has format version \(version), this code reads 1; "
                + "use the Swift files that lie beside the package."
        case .unreadableFile(let name, let reason):
            return "\(name) cannot be read (\(reason)); check that it is among the app's files."
        case .unwritableFile(let name, let reason):
            return "\(name) cannot be written (\(reason)); what was there is as it was."
        case .damaged(let what):
            return "The file is damaged (\(what)); copy it again."
        case .unsupported(let what):
            return "\(what)."
        case .unexpectedOutput(let what):
            return "The model answered with \(what); export it again."
        case .emptyPrompt:
            return "There is no text to continue; give a prompt."
        case .tokenOutsideVocabulary(let token, let size):
            return "The tokenizer gave token \(token), the model knows \(size); use the tokenizer beside the package."
        case .invalidOption(let what):
            return "\(what)."
        case .notANumber:
            return "The logits are not finite; load the model with other compute units, such as .cpuOnly."
        case .stateLost:
            return "A call of the model failed midway, so its state is lost; restore a saved state or reset."
        case .notAState:
            return "This is not a saved state."
        case .damagedState:
            return "The saved state is damaged; read the text again."
        case .stateOfAnotherModel:
            return "The state was saved with another model; read the text again with this one."
        }
    }
}
