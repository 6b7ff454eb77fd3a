import Foundation

/// What goes wrong in a way that can be mended.
public enum TTTError: Error, Equatable, Sendable {
    /// A package or bundle that `convert.py` did not write, or that does not go with `source.safetensors`.
    case notATTTPackage(String)
    /// A package of a later version of mlx-ttt.
    case formatVersion(Int)
    /// A file, by name, that is missing or no such file; and why.
    case unreadableFile(String, String)
    /// A file, by name, that could not be written; and why. What was there is as it was.
    case unwritableFile(String, String)
    /// Content that contradicts itself.
    case damaged(String)
    /// A tokenizer, chat template or state with a part that is not known here.
    case unsupported(String)
    /// The model gave something else than its description says.
    case unexpectedOutput(String)
    /// There is nothing to continue: no text before, and no prompt.
    case emptyPrompt
    /// A token that the model has no logit for: a tokenizer of another model.
    case tokenOutsideVocabulary(Int, size: Int)
    /// An option of `TTTOptions` outside its range.
    case invalidOption(String)
    /// The model was exported without a learning scale.
    case noLearningScale
    /// The model was exported without signals.
    case noSignals
    /// Logits that are not finite.
    case notANumber
    /// A call failed midway: what the model has read is not known. `restore`, `load` or `reset` come next.
    case stateLost
    /// A file that is no saved state.
    case notAState
    /// A saved state whose content is not what was written.
    case damagedState
    /// A state of a model with other weights or another tokenizer.
    case stateOfAnotherModel
}

extension TTTError: LocalizedError {
    /// One sentence that says what is wrong and what to do, in English.
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
        case .noLearningScale:
            return "This model takes no learning scale; export it for Core ML with `convert.py coreml --learning`."
        case .noSignals:
            return "This model gives no signals; export it for Core ML with `convert.py coreml --signals`."
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
